"""One-to-one matching of grid cells to nodes by their scores, greedy or optimal.

Source of the greedy one: Cai, Kang, Yao and Chen, "Ske2Grid: Skeleton-to-Grid Representation
Learning for Action Recognition", ICML 2023 (arXiv 2308.07571), and its code.
"""

import math
from typing import Literal

import torch
from torch import Tensor

Solver = Literal["greedy", "hungarian"]


# An operator of its own keeps the sequential loop out of what torch.compile traces.
@torch.library.custom_op("morse::match_nodes", mutates_args=())
def match_nodes(scores: Tensor, solver: str) -> Tensor:
    """Choose a node for each cell; matched cells have different nodes.

    The first `nodes` cells are matched; cells beyond take their largest score's node, which
    repeats. Of equal scores the first node counts.

    Args:
        scores: Scores S, (cells, nodes).
        solver: "greedy": cell after cell takes its best node that is still free. "hungarian":
            the sum of scores is the largest possible.

    Returns:
        The nodes, (cells,), of type long.
    """
    cells, nodes = scores.shape
    if solver == "hungarian":
        chosen = _hungarian(scores[:nodes].tolist())
    else:
        ranked = scores[:nodes].sort(dim=1, descending=True, stable=True).indices.tolist()
        chosen = _greedy(ranked)
    matched = torch.tensor(chosen, device=scores.device)
    return torch.cat([matched, scores[len(chosen) : cells].argmax(1)])


@match_nodes.register_fake
def _(scores: Tensor, solver: str) -> Tensor:
    return scores.new_empty(len(scores), dtype=torch.long)


def _greedy(ranked: list[list[int]]) -> list[int]:
    """Match cells in turn; `ranked` has each one's nodes, best first."""
    free = set(ranked[0])
    chosen = []
    for nodes in ranked:
        best = next(node for node in nodes if node in free)
        free.remove(best)
        chosen.append(best)
    return chosen


def _hungarian(scores: list[list[float]]) -> list[int]:
    """Match at most as many cells as nodes with the largest sum: shortest augmenting paths.

    Each cell in turn enters by the path of exchanges that costs least (Kuhn 1955; Jonker and
    Volgenant 1987); potentials of cells and nodes keep all reduced costs at 0 or above.
    """
    if not all(math.isfinite(score) for row in scores for score in row):
        raise ValueError("scores must be finite for solver='hungarian'; has training diverged?")
    nodes = range(len(scores[0]))
    cell_potential = [0.0] * len(scores)
    node_potential = [0.0] * len(nodes)
    cell_of: list[int | None] = [None] * len(nodes)
    for start in range(len(scores)):
        distance = [math.inf] * len(nodes)
        previous: list[int | None] = [None] * len(nodes)
        visited: list[int] = []
        left = set(nodes)
        cell, node, reached = start, None, 0.0
        while cell is not None:
            for other in left:
                cost = -scores[cell][other] - cell_potential[cell] - node_potential[other]
                if reached + cost < distance[other]:
                    distance[other], previous[other] = reached + cost, node
            node = min(left, key=distance.__getitem__)
            reached = distance[node]
            left.remove(node)
            visited.append(node)
            cell = cell_of[node]
        cell_potential[start] += reached
        for other in visited[:-1]:
            cell_potential[cell_of[other]] += reached - distance[other]
            node_potential[other] -= reached - distance[other]
        while node is not None:
            before = previous[node]
            cell_of[node] = start if before is None else cell_of[before]
            node = before
    chosen = {cell: node for node, cell in enumerate(cell_of)}
    return [chosen[cell] for cell in range(len(scores))]

"""Poses of 17 joints in a plane, by forward kinematics, and how to judge others by them.

The joints are Human3.6M's, as in `morse.modules.SemanticGridTransform`. Every bone has a fixed
length, so that a pose is right or wrong whatever it shows. Shapes: n poses, J = 17 joints.
"""

import math

import torch
from torch import Tensor

# 0 pelvis, 1-3 right hip, knee, foot, 4-6 left, 7 spine, 8 thorax, 9 nose, 10 head,
# 11-13 left shoulder, elbow, wrist, 14-16 right.
PARENTS = (-1, 0, 1, 2, 0, 4, 5, 0, 7, 8, 9, 8, 11, 12, 8, 14, 15)
NUM_JOINTS = len(PARENTS)
# Of the bone that ends in each joint. Metres; coordinates are half metres, about unit variance.
_LENGTHS = (
    0, 0.13, 0.45, 0.43, 0.13, 0.45, 0.43, 0.26, 0.24, 0.11, 0.13, 0.17, 0.30, 0.26, 0.17, 0.30,
    0.26,
)  # fmt: skip
LENGTHS = 2 * torch.tensor(_LENGTHS)
# Where it points in a body that stands upright, in degrees from the x axis.
REST = (0, 180, -90, -90, 0, -90, -90, 90, 90, 90, 90, 0, -90, -90, 180, -90, -90)
THIGHS, KNEES, ARMS, ELBOWS = (2, 5), (3, 6), (15, 12), (16, 13)
TRUNK = (7, 8, 9, 10)
VALID = 0.05  # the greatest relative error of a bone that counts as right
ACTIONS = ("walking", "sitting", "reaching")


def forward_kinematics(angles: Tensor) -> Tensor:
    """Turn bones' rotations against their parents, radians (n, J), into joints (n, J, 2).

    The first rotation is the whole body's. The pelvis is at the origin.
    """
    joints, turned = [torch.zeros(len(angles), 2)], [angles[:, 0]]
    for joint in range(1, NUM_JOINTS):
        parent = PARENTS[joint]
        turned.append(turned[parent] + angles[:, joint])
        direction = turned[joint] + math.radians(REST[joint])
        bone = LENGTHS[joint] * torch.stack([direction.cos(), direction.sin()], 1)
        joints.append(joints[parent] + bone)
    return torch.stack(joints, 1)


def bone_lengths(poses: Tensor) -> Tensor:
    """Measure the bones of poses (n, J, 2): (n, J - 1), in the order of `LENGTHS[1:]`."""
    return (poses[:, 1:] - poses[:, list(PARENTS[1:])]).norm(dim=2)


def draw_angles(count: int, generator: torch.Generator) -> Tensor:
    """Draw rotations for `forward_kinematics`, (count, J), from a mixture of `ACTIONS`.

    Bends are drawn for a body that faces right, kept within what joints can do, and mirrored for
    half of the bodies.
    """

    def normal(mean: float, spread: float, *size: int) -> Tensor:
        return mean + spread * torch.randn(count, *size, generator=generator)

    def uniform(*size: int) -> Tensor:
        return torch.rand(count, *size, generator=generator)

    action = (len(ACTIONS) * uniform()).long()
    walking, sitting = (action == number for number in (0, 1))
    swing = (2 * math.pi * uniform()).sin()[:, None] * torch.tensor([1.0, -1.0])
    raised = (uniform(2) < 0.5) | (uniform(1) < 0.5)  # both arms, or each by itself

    def choose(walk: Tensor, sit: Tensor, reach: Tensor) -> Tensor:
        column = (slice(None), None)
        return torch.where(walking[column], walk, torch.where(sitting[column], sit, reach))

    bends = torch.zeros(count, NUM_JOINTS)
    bends[:, THIGHS] = choose(
        28 * swing + normal(0, 4, 2), normal(80, 9, 2), normal(0, 7, 2)
    ).clamp(-30, 120)
    knees = choose(12 - 30 * swing.clamp(max=0), normal(80, 14, 2), normal(8, 6, 2))
    bends[:, KNEES] = -(knees + normal(0, 3, 2)).clamp(0, 150)
    hanging = normal(15, 12, 2)
    bends[:, ARMS] = choose(
        -24 * swing + normal(0, 5, 2),
        hanging + 10,
        torch.where(raised, normal(140, 22, 2), hanging),
    ).clamp(-60, 180)
    bends[:, ELBOWS] = choose(normal(22, 8, 2), normal(55, 22, 2), normal(20, 14, 2)).clamp(0, 150)
    bends[:, TRUNK] = normal(0, 5, 4).clamp(-20, 20)
    bends[:, TRUNK[0]] -= 10 * sitting
    facing = torch.where(uniform(1) < 0.5, 1.0, -1.0)
    return torch.deg2rad(bends * facing)


def draw_poses(count: int, seed: int) -> Tensor:
    """Draw poses, (count, J, 2)."""
    return forward_kinematics(draw_angles(count, torch.Generator().manual_seed(seed)))


def bone_errors(poses: Tensor) -> Tensor:
    """Give each bone's |length / right length - 1|, (n, J - 1)."""
    return (bone_lengths(poses) / LENGTHS[1:] - 1).abs()


def energy_distance(one: Tensor, other: Tensor) -> float:
    """Return 2 E|X - Y| - E|X - X'| - E|Y - Y'| of two sets of poses (Székely and Rizzo 2013).

    Distances are Euclidean over all coordinates, means over all pairs, so that equal sets give 0
    and finite samples of one distribution more than that: compare it with its value there.

    Args:
        one: (n, J, 2).
        other: (m, J, 2).
    """
    x, y = one.flatten(1).double(), other.flatten(1).double()
    exact = "donot_use_mm_for_euclid_dist"
    between, within_x, within_y = (
        float(torch.cdist(a, b, compute_mode=exact).mean()) for a, b in ((x, y), (x, x), (y, y))
    )
    return 2 * between - within_x - within_y

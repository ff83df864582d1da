"""Write and execute pipelines/fashion_mnist.ipynb, so that its pictures are those of this code."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

from morse.files import write_bytes

HERE = Path(__file__).parent
CELLS = [
    (
        "markdown",
        """# Morse in a notebook

A frozen denoiser, **Dash**, runs at a few steps; between them **Dot**, a fast network that shares
Dash's weights, corrects its latest estimate. The unit of cost is the **LSD**, one evaluation of
Dash; an evaluation of Dot costs 1/N of that.""",
    ),
    (
        "code",
        """import torch
from diffusers.utils import make_image_grid

from morse import MorsePipeline

pipe = MorsePipeline.from_pretrained("fashion-mnist", scheduler="leapfrog")
pipe.set_progress_bar_config(disable=True)


def noise(count=16):
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def show(images):
    return make_image_grid([image.resize((96, 96)) for image in images], rows=2, cols=8)""",
    ),
    (
        "markdown",
        "`lsd=` is the budget. `pipe.last_run` says what was done with it: D for Dash, o for Dot, "
        "g for estimates of a mixture of Gaussians, which run no network.",
    ),
    (
        "code",
        """images = pipe(batch_size=16, lsd=8, generator=noise()).images
run = pipe.last_run
print(run.plan, f"{run.num_dash} Dash + {run.num_dot} Dot = {run.lsd:.2f} LSD, {run.seconds:.2f} s")
show(images)""",
    ),
    (
        "markdown",
        "The same noise with eight steps of Dash alone. Without a plan the pipeline is the bare "
        "one, bit for bit.",
    ),
    ("code", "show(pipe(batch_size=16, num_inference_steps=8, generator=noise()).images)"),
    ("markdown", "A hundred steps of the bare pipeline, for comparison."),
    ("code", "show(pipe(batch_size=16, num_inference_steps=100, generator=noise()).images)"),
    (
        "markdown",
        """N depends on the machine and the batch. Plans are made with the N in Dot's config, so
that the same call gives the same image everywhere; measure it to plan with your machine's.""",
    ),
    (
        "code",
        """measured = pipe.measure_speed_ratio(batch_size=16)
print(f"N = {measured.speed_ratio:.1f}")
dash, dot = measured.dash_seconds[1], measured.dot_seconds[1]
print(f"one evaluation: Dash {1000 * dash:.0f} ms, Dot {1000 * dot:.0f} ms")""",
    ),
    (
        "markdown",
        """Other solvers work the same way, and so do plans of your own: a string, or counts.""",
    ),
    (
        "code",
        """from morse.schedulers import make_scheduler

pipe.scheduler = make_scheduler("dpmsolver++", pipe.scheduler.config)
show(pipe(batch_size=16, num_dash_steps=7, num_dot_steps=3, generator=noise()).images)""",
    ),
    (
        "markdown",
        """A pipeline that you already have gets a Dot by `enable_morse` and loses it again by
`disable_morse`. An untrained Dot changes nothing at first: it is exactly the reuse of Dash's latest
estimate. Train it with `accelerate launch training/train_dot.py`.""",
    ),
    (
        "code",
        """from importlib.resources import files

from diffusers import DDPMPipeline

from morse import MorseDot, disable_morse, enable_morse

plain = DDPMPipeline.from_pretrained(files("morse") / "assets" / "fashion_mnist")
plain.set_progress_bar_config(disable=True)
dot = MorseDot.from_dash(plain.unet, num_down_blocks=2, lora_rank=16)
enable_morse(plain, dot)
plain(batch_size=2, num_dash_steps=4, num_dot_steps=4)
print(plain.last_run.plan, f"{sum(p.numel() for p in dot.parameters()):,} parameters of Dot's own")
disable_morse(plain)
print(type(plain))""",
    ),
]


def build() -> None:
    """Make the notebook, run it from its folder and save it with its outputs."""
    make = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    cells = [make[kind](source) for kind, source in CELLS]
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    notebook = nbformat.v4.new_notebook(cells=cells)
    where = {"metadata": {"path": str(HERE)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            # Loading bars and warnings say nothing about Morse and name local paths.
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
            cell.metadata = {}
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata = {"kernelspec": kernel}
    nbformat.validate(notebook)
    write_bytes(HERE / "fashion_mnist.ipynb", f"{nbformat.writes(notebook)}\n".encode())


if __name__ == "__main__":
    build()

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from evaluation_fixtures import tiny_folder  # noqa: F401
from PIL import Image

from morse.evaluation.conditions import UNCONDITIONAL, Conditions, make_conditions
from morse.evaluation.fid.budgets import _cost
from morse.evaluation.fid.folders import image_file, threads_notes
from morse.evaluation.fid.generation import Recipe, Request, generate, generated_set
from morse.evaluation.fid.image_sets import open_image_set
from morse.pipeline import MorsePipeline
from morse.plan import MorsePlan

MORSE = Recipe("Morse, 2 LSD", "lsd_2", "morse", MorsePlan.from_string("DooDo"), 2, 2)
BARE = Recipe("2 steps", "steps_2", "baseline", 2, 2, 2)
REQUEST = Request(7, 5, 2, UNCONDITIONAL, {"pipeline": "tiny"})


def alone():
    return SimpleNamespace(
        process_index=0, num_processes=1, is_main_process=True, wait_for_everyone=lambda: None
    )


def several(count):
    barrier = threading.Barrier(count)
    return [
        SimpleNamespace(
            process_index=index,
            num_processes=count,
            is_main_process=index == 0,
            wait_for_everyone=barrier.wait,
        )
        for index in range(count)
    ]


@pytest.fixture
def pipe(tiny_folder):  # noqa: F811
    return load(tiny_folder)


def load(folder):
    pipe = MorsePipeline.from_pretrained(folder, scheduler="ddim")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def files(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.mark.parametrize("method", [MORSE, BARE], ids=["morse", "bare"])
def test_an_image_is_what_the_pipeline_makes_from_its_seed(pipe, tmp_path, method):
    folder, changed = generate(pipe, method, REQUEST, tmp_path, alone())
    names = [*(f"{index:08d}.png" for index in range(7)), "settings.json"]
    assert sorted(files(folder)) == names and changed == []
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    steps = {"plan": "DooDo"} if method is MORSE else {"num_inference_steps": 2}
    output = pipe(batch_size=2, generator=generators, output_type="np", **steps)
    for index, pixels in zip((2, 3), output.images, strict=True):
        written = np.array(Image.open(folder / f"{index:08d}.png"))
        np.testing.assert_array_equal(written, (pixels[:, :, 0] * 255).round().astype(np.uint8))


def test_two_processes_make_the_same_files_as_one(tiny_folder, tmp_path):  # noqa: F811
    one, _ = generate(load(tiny_folder), MORSE, REQUEST, tmp_path / "one", alone())
    pipes, states = [load(tiny_folder), load(tiny_folder)], several(2)
    shares = [[], []]
    with ThreadPoolExecutor(2) as pool:
        tasks = [
            pool.submit(
                generate, pipes[i], MORSE, REQUEST, tmp_path / "two", states[i],
                lambda done, total, i=i: shares[i].append((done, total)),
            )
            for i in range(2)
        ]  # fmt: skip
        (two, _), _ = [task.result(timeout=60) for task in tasks]
    assert files(one) == files(two)
    assert shares == [[(0, 4), (2, 4), (4, 4)], [(0, 3), (2, 3), (3, 3)]]


def test_a_killed_run_goes_on_and_gives_the_same_files(pipe, tmp_path):
    class Killed(Exception):
        pass

    def kill(done, total):
        if done == 4:
            raise Killed

    whole, _ = generate(pipe, MORSE, REQUEST, tmp_path / "whole", alone())
    with pytest.raises(Killed):
        generate(pipe, MORSE, REQUEST, tmp_path / "killed", alone(), kill)
    folder = tmp_path / "killed" / "lsd_2"
    assert len(files(folder)) == 5  # four images and the settings
    (folder / "00000001.png").unlink()  # half of a batch is sampled in its whole batch
    kept = (folder / "00000000.png").stat().st_mtime_ns
    done = []
    generate(pipe, MORSE, REQUEST, tmp_path / "killed", alone(), lambda *n: done.append(n))
    assert files(folder) == files(whole)
    assert (folder / "00000000.png").stat().st_mtime_ns == kept
    assert done == [(0, 5), (2, 5), (4, 5), (5, 5)]


def test_a_folder_may_grow(pipe, tmp_path):
    whole, _ = generate(pipe, BARE, REQUEST, tmp_path / "whole", alone())
    few, done = replace(REQUEST, num_images=5), []
    folder, _ = generate(pipe, BARE, few, tmp_path / "grown", alone())
    (folder / "fallbacks-00000004.json").write_text("{}")
    grown = generate(pipe, BARE, REQUEST, tmp_path / "grown", alone(), lambda *n: done.append(n))
    assert grown == (folder, []) and files(folder) == files(whole)
    assert done[0] == (0, 3)  # the fifth image was in a batch cut short, and is made anew
    with pytest.raises(ValueError, match="num_images was 7 and is 5"):
        generate(None, BARE, few, tmp_path / "grown", alone())


def test_runs_with_other_numbers_of_threads_are_told(pipe, tmp_path):
    one, two = (
        replace(REQUEST, settings={"pipeline": "tiny", "num_threads": [threads]})
        for threads in (1, 2)
    )
    folder, _ = generate(pipe, BARE, one, tmp_path, alone())
    generate(None, BARE, two, tmp_path, alone())
    assert threads_notes(folder) == []
    image_file(folder, 1).unlink()
    generate(pipe, BARE, two, tmp_path, alone())
    assert "made with 1, then 2 CPU threads" in threads_notes(folder)[0]
    generate(None, BARE, one, tmp_path, alone())
    assert json.loads((folder / "settings.json").read_text())["num_threads"] == [1, 2]


def test_batch_size_changes_pixels_by_rounding_at_most(pipe, tmp_path):
    pictures = []
    for size in (1, 3):
        request = replace(REQUEST, num_images=3, batch_size=size)
        folder, _ = generate(pipe, MORSE, request, tmp_path / str(size), alone())
        opened = [np.array(Image.open(image_file(folder, index))) for index in range(3)]
        pictures.append(np.stack(opened).astype(int))
    np.testing.assert_allclose(*pictures, rtol=0, atol=1)


def test_nothing_is_sampled_when_all_images_are_there(pipe, tmp_path):
    generate(pipe, BARE, REQUEST, tmp_path, alone())
    generate(None, BARE, REQUEST, tmp_path, alone())  # would fail if it called its pipeline


def test_images_of_other_settings_are_not_mixed(pipe, tmp_path):
    generate(pipe, BARE, REQUEST, tmp_path, alone())
    other = Request(7, 6, 2, UNCONDITIONAL, {"pipeline": "other"})
    with pytest.raises(ValueError, match="other settings") as caught:
        generate(pipe, BARE, other, tmp_path, alone())
    assert 'pipeline was "tiny" and is "other"; seed was 5 and is 6' in str(caught.value)
    assert "output_dir" in str(caught.value)
    one, two = ({"scheduler_config": {"steps_offset": 0, "eta": eta}} for eta in (0, 1))
    generate(pipe, BARE, replace(REQUEST, settings=one), tmp_path / "config", alone())
    with pytest.raises(ValueError, match=r"settings \(scheduler_config\.eta was 0 and is 1\)"):
        generate(None, BARE, replace(REQUEST, settings=two), tmp_path / "config", alone())
    noted = json.loads((tmp_path / "config" / "steps_2" / "settings.json").read_text())
    del noted["guidance_scale"]
    (tmp_path / "config" / "steps_2" / "settings.json").write_text(json.dumps(noted))
    with pytest.raises(ValueError, match=r"guidance_scale was missing.*, or delete that folder"):
        generate(None, BARE, replace(REQUEST, settings=one), tmp_path / "config", alone())


def test_a_foreign_folder_is_not_written_to(pipe, tmp_path):
    (tmp_path / "steps_2").mkdir()
    (tmp_path / "steps_2" / "holiday.png").write_bytes(b"")
    with pytest.raises(ValueError, match="nobody knows"):
        generate(pipe, BARE, REQUEST, tmp_path, alone())
    (tmp_path / "steps_2" / "settings.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        generate(pipe, BARE, REQUEST, tmp_path, alone())


def test_leftovers_of_a_killed_process_are_no_images(pipe, tmp_path):
    folder, _ = generate(pipe, BARE, REQUEST, tmp_path, alone())
    (folder / ".00000003.png.tmp-12").write_bytes(b"half")
    assert len(open_image_set(str(folder))) == 7
    assert len(generated_set(folder, 5)) == 5


class Recorder:
    """Stands in for a pipeline: images that tell their prompt, or are broken."""

    def __init__(self, value=0.5):
        self.value, self.calls = value, []

    def __call__(self, prompt=None, generator=None, output_type="np", **settings):
        self.calls.append({"prompt": prompt, **settings})
        images = np.full((len(generator), 4, 4, 3), 0.5, np.float32)
        images[-1, 0, 0, 0] = self.value
        return SimpleNamespace(images=images)


def test_what_did_not_go_as_planned_is_kept_with_the_images(tmp_path):
    recorder = Recorder()
    recorder.last_run = SimpleNamespace(fallbacks={"another shape": 1}, num_dash=3, num_dot=2)
    folder, changed = generate(recorder, MORSE, REQUEST, tmp_path, alone())
    assert [batch.pop("num_images") for batch in changed] == [2, 2, 2, 1]
    assert changed == [{"num_dash": 3, "num_dot": 2, "fallbacks": {"another shape": 1}}] * 4
    assert len(generate(None, MORSE, REQUEST, tmp_path, alone())[1]) == 4  # also afterwards
    assert len(open_image_set(str(folder))) == 7
    assert _cost(MORSE, [{"num_images": 2, **changed[0]}], 8, 4.0) == {
        "num_dash": 2.25,  # of 8 images 2 took a third Dash evaluation instead of a third Dot
        "num_dot": 2.75,
        "lsd": 2.25 + 2.75 / 4,
    }


def test_images_of_bfloat16(pipe, tmp_path):
    folder, _ = generate(pipe.to(torch.bfloat16), BARE, REQUEST, tmp_path, alone())
    assert "00000006.png" in files(folder)


def test_image_i_takes_prompt_i_modulo_all(tmp_path):
    recorder = Recorder()
    request = Request(5, 0, 2, Conditions(("a", "b", "c"), guidance_scale=7.5), {})
    folder, _ = generate(recorder, BARE, request, tmp_path, alone())
    assert [call["prompt"] for call in recorder.calls] == [["a", "b"], ["c", "a"], ["b"]]
    assert all(call["guidance_scale"] == 7.5 for call in recorder.calls)
    assert json.loads((folder / "settings.json").read_text())["prompts"] == ["a", "b", "c"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_images_that_are_not_finite_are_refused(tmp_path, value):
    with pytest.raises(ValueError, match=r"2 steps: the images of seeds \[6\] hold NaN"):
        generate(Recorder(value), BARE, REQUEST, tmp_path, alone())
    assert [file.name for file in (tmp_path / "steps_2").iterdir()] == ["settings.json"]


def test_image_i_takes_class_i_modulo_all(tmp_path):
    recorder = Recorder()
    request = Request(3, 0, 2, Conditions(class_labels=(4, 7)), {})
    folder, _ = generate(recorder, BARE, request, tmp_path, alone())
    assert [call["class_labels"] for call in recorder.calls] == [[4, 7], [4]]
    assert json.loads((folder / "settings.json").read_text())["class_labels"] == [4, 7]


def test_prompts_and_pipelines_must_suit_each_other(pipe):
    assert make_conditions(pipe).arguments(range(2)) == {"batch_size": 2}
    with pytest.raises(ValueError, match="takes none"):
        make_conditions(pipe, ("a",))

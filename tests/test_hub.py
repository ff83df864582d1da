"""Publishing on the hub (with a fake of it), model cards, and loading without a network."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from attached import latents, planned, text_pipe, trained_dot
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.utils import filter_repo_objects

from morse import MorseDot, MorsePipeline, enable_morse
from morse.dot.card import hub_id

NO_TEXT_MODELS = {"text_encoder": None, "tokenizer": None}


@pytest.fixture
def pipe():
    pipe = text_pipe()
    dot = trained_dot(pipe.unet)
    dot.register_to_config(speed_ratio=6.5, plan_ratio={"default": 2.0, "DDIMScheduler": 1.75})
    return enable_morse(pipe, dot)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that is a folder."""
    root = tmp_path / "hub"

    calls = []

    class FakeApi:
        def __init__(self, token=None):
            self.token = token

        def create_repo(self, repo_id, private, exist_ok):
            assert exist_ok
            calls.append((repo_id, private, self.token))
            full_name = repo_id if "/" in repo_id else f"somebody/{repo_id}"
            (root / full_name).mkdir(parents=True, exist_ok=True)
            return SimpleNamespace(repo_id=full_name)

        def file_exists(self, repo_id, filename):
            return (root / repo_id / filename).exists()

        def upload_folder(
            self, repo_id, folder_path, path_in_repo, commit_message, create_pr, ignore_patterns
        ):
            calls.append((commit_message, create_pr))
            target = root / repo_id / (path_in_repo or "")
            files = [path for path in folder_path.rglob("*") if path.is_file()]
            names = [path.relative_to(folder_path).as_posix() for path in files]
            for name in filter_repo_objects(names, ignore_patterns=ignore_patterns):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder_path / name, target / name)
            return "a commit"

    monkeypatch.setattr("morse.dot.hub.HfApi", FakeApi)
    return SimpleNamespace(root=root, calls=calls)


@pytest.mark.supports("interplay", "`push_to_hub`")
class TestPublishing:
    def test_a_dot(self, pipe, hub):
        commit = pipe.dot.push_to_hub("my-dot", "First", private=True, token="t", create_pr=True)
        assert commit == "a commit" and hub.calls == [("my-dot", True, "t"), ("First", True)]
        folder = hub.root / "somebody" / "my-dot"
        assert {path.name for path in folder.iterdir()} == {
            "README.md",
            "config.json",
            "diffusion_pytorch_model.safetensors",
        }
        other = text_pipe()
        enable_morse(other, MorseDot.from_pretrained(folder))
        assert torch.equal(planned(other), planned(pipe))

    def test_a_pipeline(self, pipe, hub):
        pipe.push_to_hub("us/pipe")
        folder = hub.root / "us" / "pipe"
        assert (folder / "dot" / "README.md").exists() and (folder / "model_index.json").exists()
        loaded = MorsePipeline.from_pretrained(folder, **NO_TEXT_MODELS)
        loaded.set_progress_bar_config(disable=True)
        assert torch.equal(planned(loaded), planned(pipe))

    @pytest.mark.parametrize("name", ["dot", "pipe"])
    def test_while_saving(self, pipe, hub, tmp_path, name):
        model = pipe.dot if name == "dot" else pipe
        model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="us/it", private=False)
        model.save_pretrained(tmp_path / "named", push_to_hub=True)
        assert hub.calls[0] == ("us/it", False, None) and hub.calls[2][0] == "named"
        for folder in (tmp_path / "saved", hub.root / "us" / "it", hub.root / "somebody" / "named"):
            assert "# " in (folder / "README.md").read_text()

    @pytest.mark.parametrize("name", ["dot", "pipe"])
    def test_as_safetensors_alone(self, pipe, hub, name):
        model = pipe.dot if name == "dot" else pipe
        model.push_to_hub("us/it", safe_serialization=True)
        assert any((hub.root / "us" / "it").rglob("*.safetensors"))
        with pytest.raises(ValueError, match=r"safe_serialization is False.*leave it out"):
            model.push_to_hub("us/it", safe_serialization=False)

    def test_into_a_subfolder_as_a_variant(self, pipe, hub):
        pipe.dot.push_to_hub("us/it", variant="fp16", subfolder="small")
        names = {path.name for path in (hub.root / "us" / "it" / "small").iterdir()}
        assert "diffusion_pytorch_model.fp16.safetensors" in names

    def test_a_card_that_is_there_stays(self, pipe, hub, tmp_path):
        for folder in (hub.root / "us" / "it", tmp_path / "saved"):
            folder.mkdir(parents=True)
            (folder / "README.md").write_text("mine")
        pipe.dot.push_to_hub("us/it")
        pipe.dot.save_pretrained(tmp_path / "saved")
        for folder in (hub.root / "us" / "it", tmp_path / "saved"):
            assert (folder / "README.md").read_text() == "mine"
            assert (folder / "config.json").exists()

    def test_the_card_of_a_pipelines_dot_stays_too(self, pipe, hub):
        pipe.push_to_hub("us/it")
        card = hub.root / "us" / "it" / "dot" / "README.md"
        card.write_text("mine")
        pipe.push_to_hub("us/it")
        assert card.read_text() == "mine"

    def test_one_process_writes_the_card_and_publishes(self, pipe, hub, tmp_path):
        pipe.dot.save_pretrained(tmp_path / "a", is_main_process=False, push_to_hub=True)
        pipe.dot.save_pretrained(tmp_path / "b", False)
        assert not list(tmp_path.rglob("README.md")) and not hub.calls


@pytest.fixture
def downloads(hub, monkeypatch):
    """diffusers' downloads from that hub."""

    def download(repo_id, filename, subfolder=None, **options):
        path = hub.root / repo_id / (subfolder or "") / filename
        if not path.is_file():
            raise EntryNotFoundError(filename)
        return str(path)

    def info(repo_id, **options):
        folder = hub.root / repo_id
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])

    for module in ("configuration_utils", "utils.hub_utils", "pipelines.pipeline_utils"):
        monkeypatch.setattr(f"diffusers.{module}.hf_hub_download", download)
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.model_info", info)
    monkeypatch.setattr(
        "diffusers.pipelines.pipeline_utils._resolve_revision", lambda name, **options: "0a1b"
    )


@pytest.mark.usefixtures("downloads")
class TestLoading:
    def test_a_pipeline_with_its_dot(self, pipe):
        pipe.push_to_hub("us/pipe")
        loaded = MorsePipeline.from_pretrained("us/pipe", **NO_TEXT_MODELS)
        loaded.set_progress_bar_config(disable=True)
        assert torch.equal(planned(loaded), planned(pipe))

    def test_by_plain_diffusers(self, pipe):
        pipe.push_to_hub("us/pipe")
        plain = DiffusionPipeline.from_pretrained("us/pipe", **NO_TEXT_MODELS)
        plain.set_progress_bar_config(disable=True)
        assert "dot" not in plain.components
        options = {"num_inference_steps": 2}
        assert torch.equal(latents(plain, **options), latents(pipe, **options))

    def test_a_folder_that_names_our_library(self, pipe, tmp_path):
        """As they were written before."""
        pipe.save_pretrained(tmp_path)
        index = json.loads((tmp_path / "model_index.json").read_text())
        assert index["dot"] == [None, "MorseDot"] and pipe.config["dot"] == ("morse", "MorseDot")
        (tmp_path / "model_index.json").write_text(
            json.dumps({**index, "dot": ["morse", "MorseDot"]})
        )
        loaded = MorsePipeline.from_pretrained(tmp_path, **NO_TEXT_MODELS)
        loaded.set_progress_bar_config(disable=True)
        assert torch.equal(planned(loaded), planned(pipe))

    def test_a_dot_of_a_pipeline_or_by_itself(self, pipe):
        pipe.push_to_hub("us/pipe")
        pipe.dot.push_to_hub("us/dot")
        expected = planned(pipe)
        for name in ("us/pipe", "us/dot"):
            assert torch.equal(planned(MorsePipeline.from_pipe(text_pipe(), name)), expected)

    def test_a_dot_that_is_not_there(self, pipe):
        pipe.dot.push_to_hub("us/dot", subfolder="small")
        with pytest.raises(
            OSError, match=r"'us/dot'.* no Dot .* in its root, nor .*subfolder=.*revision"
        ):
            MorsePipeline.from_pipe(text_pipe(), "us/dot")


class TestCards:
    def card(self, model, folder):
        model.save_pretrained(folder)
        return ModelCard.load(folder / "README.md")

    def test_a_dots_card_says_what_its_config_says(self, pipe, tmp_path):
        card = self.card(pipe.dot, tmp_path)
        assert card.data.license == "unknown" and card.data.library_name == "diffusers"
        assert card.data.tags == ["morse"] and card.data.base_model is None
        rows = dict(re.findall(r"^\| (\S.*?) \| (.*?) \|$", card.text, re.MULTILINE))
        assert rows["base model"] == "not recorded"
        assert rows["N (Dash's time over Dot's)"] == "6.5"
        assert rows["evaluations per LSD"] == "default: 2.0; DDIMScheduler: 1.75"
        assert rows["m (extra down-sampling blocks)"] == "1" and rows["LoRA rank"] == "2"
        assert rows["base that Dot corrects (`base_space`)"] == "by the scheduler"
        parameters = sum(value.numel() for value in pipe.unet.parameters())
        assert rows["Dash"] == f"UNet2DConditionModel, {parameters:,} parameters"

    def test_searched_plans_are_told(self, tmp_path):
        dot = MorseDot.from_dash(text_pipe().unet, 1)
        assert "LSD of saved plans" not in self.card(dot, tmp_path / "without").text
        saved = [{"lsd": 4, "plan": "DoDD"}, {"lsd": 5.5, "plan": "DDDDD"}]
        saved.append({"lsd": 4, "plan": "DDDD", "solver_options": {"clean_above": 1e9}})
        dot.register_to_config(plans={"LeapfrogScheduler": saved})
        text = self.card(dot, tmp_path / "with").text
        assert "| LSD of saved plans | LeapfrogScheduler: 4, 5.5 |" in text

    def test_what_is_not_known_is_not_made_up(self, tmp_path):
        dot = MorseDot.from_dash(text_pipe().unet, 1)
        rows = self.card(dot, tmp_path).text
        for name in ("N (Dash's time over Dot's)", "evaluations per LSD", "base model"):
            assert f"| {name} | not recorded |" in rows
        assert str(tmp_path) not in rows

    def test_the_base_model_where_it_is_known(self, pipe, tmp_path):
        pipe.register_to_config(_name_or_path="owner/base")
        assert self.card(pipe, tmp_path / "pipe").data.base_model == "owner/base"
        place = "/cache/hub/models--owner--base-1.5/snapshots/0a1b/unet"
        pipe.unet.register_to_config(_name_or_path=place)
        card = self.card(pipe.dot, tmp_path / "dot")
        assert card.data.base_model == "owner/base-1.5" and place not in card.text
        assert 'from_pretrained("owner/base-1.5", dot="THIS MODEL")' in card.text

    def test_of_a_pipeline_without_a_dot(self, tmp_path):
        card = self.card(enable_morse(text_pipe(), None), tmp_path)
        assert "| pipeline | StableDiffusionPipeline |" in card.text and "LoRA" not in card.text

    def test_places_that_are_no_hub_ids(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "a" / "b").mkdir(parents=True)
        for place in (None, "", "name", "a/b", "./a/b", "../a", "/a/b/c", str(tmp_path)):
            assert hub_id(place) is None
        assert hub_id("c/d") == "c/d"


class TestWithoutNetwork:
    """Nothing is asked of the network for a local folder; what is missing is named."""

    @pytest.fixture(autouse=True)
    def no_network(self, monkeypatch):
        def refuse(*args, **kwargs):
            raise AssertionError("the network was asked")

        monkeypatch.setattr("socket.socket.connect", refuse)

    @pytest.fixture
    def saved(self, pipe, tmp_path):
        pipe.save_pretrained(tmp_path / "pipe")
        return tmp_path / "pipe"

    def test_a_saved_folder(self, saved):
        for options in ({}, {"local_files_only": True}):
            assert MorsePipeline.from_pretrained(saved, **NO_TEXT_MODELS, **options).dot

    @pytest.mark.parametrize(
        "name",
        ["model_index.json", "dot/config.json", "dot/diffusion_pytorch_model.safetensors"],
    )
    def test_a_missing_file_is_named(self, saved, name):
        (saved / name).unlink()
        with pytest.raises(OSError, match=re.escape(Path(name).name)) as error:
            MorsePipeline.from_pretrained(saved, **NO_TEXT_MODELS)
        assert str(saved) in str(error.value)

    @pytest.mark.parametrize("load", [MorsePipeline.from_pretrained, MorseDot.from_pretrained])
    def test_an_id_that_was_never_downloaded(self, load, tmp_path):
        with pytest.raises((OSError, ValueError), match="nobody/nothing") as error:
            load("nobody/nothing", local_files_only=True, cache_dir=tmp_path)
        assert re.search(r"model_index\.json|config\.json", str(error.value))

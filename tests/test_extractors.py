import json
import shutil
from dataclasses import replace
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from morse.evaluation.digests import file_sha256
from morse.evaluation.features import FashionFeatures, features_sha256
from morse.evaluation.fid import transformers_extractors
from morse.evaluation.fid.extractors import ExtractorOptions, load_extractor
from morse.evaluation.torch_fidelity_loader import fidelity_module

CPU = torch.device("cpu")


def random_images(count=2, channels=3, size=32):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, size, size), generator=generator).byte()


class Means(nn.Module):
    """A user's network: the mean of each colour."""

    def forward(self, images):
        assert images.dtype == torch.float32 and images.max() <= 1
        return images.mean(dim=(2, 3))


class Grey(Means):
    channels = 1


class Scalar(nn.Module):
    def forward(self, images):
        return images.mean()


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """torch-fidelity's network with random weights, and these weights in a file."""
    module = fidelity_module("feature_extractor_inceptionv3")
    network_class, names = module.FeatureExtractorInceptionV3, ["2048", "logits_unbiased"]
    torch.manual_seed(0)
    with (
        mock.patch.object(module, "load_state_dict_from_url", lambda *_, **__: {}),
        mock.patch.object(network_class, "load_state_dict", lambda self, state: None),
    ):
        network = network_class("inception-v3-compat", names, verbose=False)
    file = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    save_file(network.state_dict(), file)
    return network, file


def test_inception_equals_torch_fidelitys_own(inception):
    network, file = inception
    extractor = load_extractor("inception", CPU, ExtractorOptions(inception_weights=file))
    features, logits = extractor.compute(random_images())
    assert features.shape == (2, 2048) and logits.shape == (2, 1008)
    expected = network(random_images())
    torch.testing.assert_close((features, logits), expected, rtol=0, atol=0)
    assert extractor.sha256 == file_sha256(file) and "TensorFlow 1" in extractor.resize
    assert extractor.resizes and extractor.has_logits and extractor.channels == 3


def test_missing_inception_weights_say_where_they_are_and_how_to_convert(tmp_path):
    with pytest.raises(ValueError, match=r"weights-inception-2015-12-05-6726825d\.pth") as caught:
        load_extractor("inception", CPU)
    assert "v0.2.0" in str(caught.value) and 'python -c "' in str(caught.value)
    with pytest.raises(FileNotFoundError, match="is no file"):
        load_extractor("inception", CPU, ExtractorOptions(tmp_path / "no.safetensors"))


def test_the_conversion_command_makes_a_loadable_file(inception, tmp_path, monkeypatch):
    from morse.evaluation.fid.extractors import CONVERT, INCEPTION_FILE

    monkeypatch.chdir(tmp_path)
    torch.save(inception[0].state_dict(), INCEPTION_FILE)
    code = CONVERT.removeprefix('python -c "').removesuffix('"')
    exec(code, {})
    load_extractor("inception", CPU, ExtractorOptions(tmp_path / "inception.safetensors"))


@pytest.mark.parametrize("kind", ["other tensors", "no safetensors"])
def test_other_weights_are_refused(tmp_path, kind):
    file = tmp_path / "w.safetensors"
    if kind == "other tensors":
        save_file({"fc.weight": torch.zeros(1000, 2048)}, file)
    else:
        file.write_bytes(b"\x80\x02pickle")
    with pytest.raises(ValueError, match="does not hold the tensors"):
        load_extractor("inception", CPU, ExtractorOptions(file))


def test_fashion_mnist_pads_28_pixels_and_gives_logits():
    extractor = load_extractor("fashion-mnist", CPU)
    small = random_images(3, 1, 28)
    features, logits = extractor.compute(small)
    padded = torch.nn.functional.pad(small, (2, 2, 2, 2))
    torch.testing.assert_close(extractor.compute(padded), (features, logits))
    assert features.shape == (3, 32) and logits.shape == (3, 10)
    assert extractor.sha256 == features_sha256() and extractor.channels == 1
    assert isinstance(FashionFeatures(), nn.Module)


def test_a_users_own_network():
    extractor = load_extractor(f"{__name__}:Means", CPU)
    images = random_images()
    features, logits = extractor.compute(images)
    torch.testing.assert_close(features, images.float().mean(dim=(2, 3)) / 255)
    assert logits is None and not extractor.resizes and len(extractor.sha256) == 64
    assert load_extractor(f"{__name__}:Grey", CPU).channels == 1


def test_wrong_extractors_are_named():
    with pytest.raises(ValueError, match="choose inception, clip, dinov2"):
        load_extractor("vgg", CPU)
    for name in ("no.module:Net", f"{__name__}:Nothing"):
        with pytest.raises(ValueError, match="cannot be loaded"):
            load_extractor(name, CPU)
    with pytest.raises(ValueError, match=r"no nn\.Module"):
        load_extractor("collections:OrderedDict", CPU)
    with pytest.raises(ValueError, match=r"must return features \(B, D\)"):
        load_extractor(f"{__name__}:Scalar", CPU).compute(random_images())


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("clip")
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config={**shape, "num_hidden_layers": 1, "vocab_size": 54, "eos_token_id": 53,
                     "bos_token_id": 52, "max_position_embeddings": 20},
        vision_config={**shape, "num_hidden_layers": 1, "image_size": 32, "patch_size": 8},
        projection_dim=8,
    )  # fmt: skip
    transformers.CLIPModel(config).save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    content = {"image_processor_type": "CLIPImageProcessor", **size}
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder):
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))


def test_clip_gives_unit_vectors_of_images_and_prompts_in_one_space(clip_folder):
    import transformers

    extractor = load_extractor("clip", CPU, ExtractorOptions(clip_model=str(clip_folder)))
    features, logits = extractor.compute(random_images(3, size=40))
    text = extractor.embed_text(["a cat", "a dog on a very long wall" * 5])
    assert features.shape == (3, 8) and text.shape == (2, 8) and logits is None
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(text.norm(dim=1), torch.ones(2))
    model = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(clip_folder)(["a cat"], return_tensors="pt")
    pixels = transformers.AutoImageProcessor.from_pretrained(clip_folder, backend="pil")(
        [image.permute(1, 2, 0).numpy() for image in random_images(3, size=40)],
        input_data_format="channels_last",
        return_tensors="pt",
    )["pixel_values"]
    output = model(input_ids=tokens["input_ids"], pixel_values=pixels)
    torch.testing.assert_close(features, output.image_embeds)
    torch.testing.assert_close(text[:1], output.text_embeds)
    assert extractor.resize == "Pillow bicubic to shorter side 32, centre crop 32x32"
    assert extractor.sha256 == file_sha256(clip_folder / "model.safetensors")


def test_dinov2_squeezes_whole_images(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    transformers.Dinov2Model(config).save_pretrained(tmp_path)
    content = {
        "image_processor_type": "BitImageProcessor",
        "resample": 3,
        "size": {"shortest_edge": 32},
        "crop_size": {"height": 28, "width": 28},
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    extractor = load_extractor("dinov2", CPU, ExtractorOptions(dinov2_model=str(tmp_path)))
    images = random_images(2, size=56)
    images[:, :, :14] = 0  # a crop would leave less of this
    features, _ = extractor.compute(images)
    assert features.shape == (2, 16)
    assert extractor.resize == "Pillow bicubic to 28x28"
    assert extractor.titles["frechet"].startswith("Fréchet distance (DINOv2 features")  # not large
    wide = extractor.compute(torch.cat([images, images], dim=3))[0]
    assert wide.shape == (2, 16)


def test_weights_that_are_not_in_the_file_are_not_made_up(clip_folder, tmp_path):
    shutil.copytree(clip_folder, tmp_path / "clip")
    file = tmp_path / "clip" / "model.safetensors"
    tensors = load_file(file)
    del tensors["visual_projection.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights, \['visual_projection.weight"):
        load_extractor("clip", CPU, ExtractorOptions(clip_model=str(tmp_path / "clip")))


def test_weights_alone_are_not_enough(clip_folder, tmp_path):
    for name in ("model.safetensors", "config.json"):
        shutil.copy(clip_folder / name, tmp_path / name)
    with pytest.raises(ValueError, match=r"no image processor .*AutoProcessor.*save_pretrained"):
        load_extractor("clip", CPU, ExtractorOptions(clip_model=str(tmp_path)))


def test_a_model_with_more_weights_is_another(clip_folder, tmp_path):
    shutil.copytree(clip_folder, tmp_path / "clip")
    file = tmp_path / "clip" / "model.safetensors"
    tensors = load_file(file) | {"vision_model.embeddings.register_tokens": torch.zeros(1, 4, 16)}
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match="it has 1 weights more"):
        load_extractor("clip", CPU, ExtractorOptions(clip_model=str(tmp_path / "clip")))


def test_names_of_metrics_are_those_of_their_models(clip_folder):
    extractor = load_extractor("clip", CPU, ExtractorOptions(clip_model=str(clip_folder)))
    assert extractor.titles["cmmd"] == f"CMMD ({extractor.words})"
    assert replace(extractor, is_standard=True).titles["cmmd"] == "CMMD"
    dino = replace(extractor, name="dinov2", words="DINOv2 features, small")
    assert dino.titles["frechet"] == "Fréchet distance (DINOv2 features, small)"
    assert replace(dino, is_standard=True).titles["frechet"] == "FD-DINOv2"


def test_files_of_a_model_fetched_by_others_are_completed(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").touch()
    fetched = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **options: str(tmp_path))
    monkeypatch.setattr(
        transformers_extractors, "_download", lambda *args: fetched.append(args) or tmp_path
    )
    assert transformers_extractors._fetch("someone/clip", "clip_model") == tmp_path
    assert fetched == [("someone/clip", "clip_model")]


@pytest.mark.parametrize("name", ["clip", "dinov2"])
def test_a_model_that_cannot_be_had_says_what_to_fetch(name, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    options = ExtractorOptions(clip_model="nobody/nothing", dinov2_model="nobody/nothing")
    with pytest.raises(ValueError, match="hf download nobody/nothing") as caught:
        load_extractor(name, CPU, options)
    assert f"--{name}_model" in str(caught.value)
    options = ExtractorOptions(clip_model=str(tmp_path), dinov2_model=str(tmp_path))
    with pytest.raises(ValueError, match="no weights in safetensors"):
        load_extractor(name, CPU, options)

"""Adapters of the user's own (PEFT, `load_lora_weights`) beside the LoRA of a Dot."""

import copy
import pickle
from functools import cache

import pytest
import torch
from attached import check_treated, difference, latents, planned, text_pipe, trained_dot

from morse import MorseDot, enable_morse
from morse.dot.fingerprint import fingerprint

BOTH = pytest.mark.parametrize("merge_lora", [True, False])
TARGETS = ("to_q", "to_v", "ff.net.2", "resnets.0.conv1")
check_once = cache(check_treated)


def lora_weights(unet, seed=0, rank=2, targets=TARGETS):
    """A LoRA as it is saved, on the linear layers and convolutions whose names end so."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, layer in unet.named_modules():
        if name.endswith(targets) and isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
            out_channels, in_channels, *kernel = layer.weight.shape
            shapes = {
                "lora_A": (rank, in_channels, *kernel),
                "lora_B": (out_channels, rank, *(1 for _ in kernel)),
            }
            for part, shape in shapes.items():
                value = 0.2 * torch.randn(shape, generator=generator)
                weights[f"unet.{name}.{part}.weight"] = value
    return weights


UNET = text_pipe().unet
WEIGHTS = {name: lora_weights(UNET, seed) for seed, name in enumerate(("style", "other"))}


def load(pipe, *names):
    for name in names or ("style",):
        pipe.load_lora_weights(dict(WEIGHTS[name]), adapter_name=name)


def load_both(pipe):
    load(pipe, "style", "other")
    pipe.set_adapters(["style", "other"], [0.7, -0.4])


def load_and_fuse(pipe):
    load(pipe)
    pipe.fuse_lora(lora_scale=0.8)


def fuse_and_unfuse(pipe):
    load_and_fuse(pipe)
    latents(pipe, num_inference_steps=2)
    pipe.unfuse_lora()


def load_and_disable(pipe):
    load(pipe)
    pipe.disable_lora()


def test_the_lora_of_these_tests_is_visible():
    pipe = text_pipe()
    without = latents(pipe, num_inference_steps=2)
    load(pipe)
    assert difference(latents(pipe, num_inference_steps=2), without) > 1


@pytest.mark.parametrize(
    ("treat", "merge_lora"),
    [(load, True), (load, False), (load_both, False), (load_and_disable, True),
     (load_and_fuse, True), (load_and_fuse, False)],
)  # fmt: skip
@pytest.mark.supports("interplay", "users’ LoRA")
def test_dash_and_dot_run_with_it(treat, merge_lora):
    check_once(treat, merge_lora)


@BOTH
def test_fused_and_unfused_again(merge_lora):
    """Subtracting leaves rounding errors in the weights, here as without Morse."""
    check_treated(fuse_and_unfuse, merge_lora)


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_scale_of_one_call(scale):
    check_treated(load, make_pipe=encoded_pipe, cross_attention_kwargs={"scale": scale})


def encoded_pipe():
    """With a text encoder: diffusers scales its LoRA too, and wants there to be one."""
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    pipe = text_pipe()
    encoder = CLIPTextModel(CLIPTextConfig(vocab_size=8, num_hidden_layers=1, **sizes))
    pipe.register_modules(text_encoder=encoder)
    return pipe


@BOTH
def test_unloading_restores_the_image(merge_lora):
    pipe = text_pipe()
    enable_morse(pipe, trained_dot(pipe.unet), merge_lora)
    before = planned(pipe)
    load(pipe)
    assert difference(planned(pipe), before) > 1
    pipe.unload_lora_weights()
    assert torch.equal(planned(pipe), before)


@BOTH
def test_every_change_reaches_dot(merge_lora):
    """Each state draws what a Dot attached in that state draws."""
    pipe = text_pipe()
    dot = trained_dot(pipe.unet)
    enable_morse(pipe, dot, merge_lora)
    found = []
    for change in (
        load,
        lambda pipe: pipe.set_adapters("style", 0.3),
        lambda pipe: pipe.disable_lora(),
        lambda pipe: pipe.enable_lora(),
        lambda pipe: pipe.fuse_lora(),
        lambda pipe: pipe.unfuse_lora(),
        lambda pipe: pipe.set_adapters("style", 0.0),
    ):
        change(pipe)
        residual = run(pipe.dot.bind(pipe.unet), pipe.unet)
        anew = MorseDot.from_config(dot.config)
        anew.load_state_dict(dot.state_dict())
        anew.eval().bind(pipe.unet)
        if merge_lora:
            anew.merge_lora()
        assert torch.equal(residual, run(anew, pipe.unet))
        found.append(residual)
    # Alone these agree: enabling undoes disabling, and unfusing fusing; 0 is as good as disabled.
    torch.testing.assert_close(found[1], found[3])
    torch.testing.assert_close(found[4], found[3], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[5], found[3], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[6], found[2], rtol=1e-3, atol=1e-4)
    for one, other in ((0, 1), (1, 2)):
        assert difference(found[one], found[other]) > 1e-3


def run(dot, unet):
    from attached import text_inputs

    from morse.sampling import JumpPoint

    sample, output = torch.randn(2, 2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    jump = JumpPoint(sample, torch.tensor(700), output)
    text = text_inputs()["prompt_embeds"]
    with torch.no_grad():
        return dot(sample + 1, torch.tensor(400), jump, encoder_hidden_states=text)


class TestFingerprint:
    def test_is_that_of_dash_without_the_lora(self):
        pipe = text_pipe()
        expected = fingerprint(pipe.unet)
        load(pipe)
        assert fingerprint(pipe.unet) == expected
        pipe.fuse_lora()
        found = fingerprint(pipe.unet)
        assert found["structure"] == expected["structure"]
        assert found["weights"] == pytest.approx(expected["weights"], abs=2e-3)

    def test_a_lora_that_became_part_of_the_weights_is_another_dash(self, tmp_path):
        """After fusing and unloading nobody knows the weights that Dash had.

        A slight change, or one of few layers, is taken for the same Dash.
        """
        pipe, dot = text_pipe(), trained_dot(UNET)
        attached = text_pipe()
        enable_morse(attached, trained_dot(attached.unet))
        for each in (pipe, attached):
            each.load_lora_weights(lora_weights(UNET, targets=("",)))
            each.fuse_lora(lora_scale=5.0)
            each.unload_lora_weights()
        with pytest.raises(ValueError, match=r"another Dash(.|\n)*without a LoRA fused"):
            enable_morse(pipe, dot)
        expected = planned(attached)  # where it was attached before, it stays
        other = text_pipe()
        for parameter in other.unet.parameters():
            torch.nn.init.normal_(parameter)
        for copied in (copy.deepcopy(attached), pickle.loads(pickle.dumps(attached))):
            assert torch.equal(planned(copied), expected)
            with pytest.raises(ValueError, match="another Dash"):
                enable_morse(other, copied.dot)
        with pytest.warns(UserWarning, match=r"refused when it is loaded.*\n  expected"):
            attached.save_pretrained(tmp_path)

    def test_a_dot_made_beside_a_lora_is_made_for_dash_alone(self):
        pipe = text_pipe()
        expected = MorseDot.from_dash(pipe.unet, 1, lora_rank=2)
        load(pipe)
        pipe.unet.add_adapter(lora_on("conv_in", "conv_out", "time_embedding.linear_2"), "more")
        assert MorseDot.from_dash(pipe.unet, 1, lora_rank=2).config == expected.config


def lora_on(*names):
    from peft import LoraConfig

    return LoraConfig(r=2, target_modules=list(names), init_lora_weights=False)


def test_on_the_layers_that_dot_replaces_or_calls_itself():
    def treat(pipe):
        torch.manual_seed(5)
        names = ("conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2")
        pipe.unet.add_adapter(lora_on(*names), "ends")

    check_treated(treat)


def test_with_offloading():
    def treat(pipe):
        load(pipe)
        pipe.enable_model_cpu_offload(device="cpu")

    assert torch.equal(check_treated(treat), check_once(load, False))

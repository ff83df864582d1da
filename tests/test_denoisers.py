"""Which models of which pipelines are switched, however they are named and called."""

import inspect

import diffusers
import pytest
import torch
from pipeline_checks import counted, latents, make_dot, own_dot
from tiny_pipelines import loop_pipeline, picture, stable_diffusion, text_inputs, text_unet
from torch import nn

from morse import enable_morse
from morse.denoisers import _GROUPS, find_denoisers, result_of, take_apart
from morse.signatures import find_signature


class TestWhatIsFound:
    @staticmethod
    def pipe(*names, scheduler="scheduler"):
        class Pipeline(diffusers.DiffusionPipeline):
            def __init__(self, **parts):
                super().__init__()
                self.register_modules(**parts)

        parts = {name: nn.Linear(1, 1) for name in names}
        return Pipeline(**parts, **{scheduler: diffusers.DDIMScheduler()})

    @pytest.mark.parametrize(
        ("names", "found"),
        [
            (["vae", "unet"], ["unet"]),
            (["unet", "prior"], ["unet"]),  # the prior has its own scheduler
            (["transformer_2", "transformer"], ["transformer", "transformer_2"]),
            (["transformer", "unconditional_transformer"],) * 2,
            (["transformer_2"],) * 2,
            (["prior", "text_encoder"], ["prior"]),
            (["decoder", "vqgan"], ["decoder"]),
        ],
    )
    def test_names(self, names, found):
        assert list(find_denoisers(self.pipe(*names))) == found

    @pytest.mark.parametrize(
        ("names", "scheduler"),
        [(["vae", "model"], "scheduler"), (["prior", "decoder"], "prior_scheduler")],
    )
    def test_refused(self, names, scheduler):
        pipe = self.pipe(*names, scheduler=scheduler)
        classes = type(pipe)
        message = f"Pipeline has no unet or transformer.*its models are {names}".replace("[", r"\[")
        with pytest.raises(ValueError, match=message):
            enable_morse(pipe, own_dot)
        assert type(pipe) is classes


class Odd(nn.Module):
    """A denoiser that is called or answers in another way."""

    def __init__(self, unet, kind):
        super().__init__()
        self.unet, self.kind = unet, kind
        self.config, self.device, self.dtype = unet.config, unet.device, unet.dtype

    def forward(self, sample, timestep, return_dict=True):
        if self.kind == "list":
            output = self.unet(torch.stack(sample), timestep).sample
            return ([*output],)
        output = self.unet(sample, timestep).sample
        return output if self.kind == "tensor" else (output, output + 1)


class TestOddDenoisers:
    @pytest.fixture
    def make(self, build_unet):
        def make(kind):
            pipe = loop_pipeline(build_unet(), diffusers.DDIMScheduler(clip_sample=False))
            odd = pipe.unet = Odd(pipe.unet, kind)
            if kind == "tensor":
                odd.register_forward_hook(lambda unet, given, output: output[None])
            return pipe

        return make

    def run(self, pipe, **options):
        return pipe(generator=torch.Generator().manual_seed(0), **options).images

    def test_several_results_are_dash_alone(self, make):
        pipe = make("several")
        expected = self.run(pipe, num_inference_steps=4)
        enable_morse(pipe, own_dot)
        with pytest.warns(UserWarning, match="made none"):
            assert torch.equal(self.run(pipe, plan="DoDo"), expected)
        assert pipe.last_run.fallbacks == {"it returns several results": 2}

    def test_a_list_of_samples_is_dash_alone(self, make):
        pipe = make("list")
        enable_morse(pipe, own_dot)
        scale, step = pipe.scheduler.scale_model_input, pipe.scheduler.step
        pipe.scheduler.scale_model_input = lambda sample, timestep: [*scale(sample, timestep)]
        pipe.scheduler.step = lambda output, *rest: step(torch.stack([*output]), *rest)
        with pytest.warns(UserWarning, match="made none"):
            self.run(pipe, plan="DoDo")
        reason = "the denoiser is not given one sample and one timestep"
        assert pipe.last_run.fallbacks == {reason: 4} and pipe.last_run.num_dash == 4
        assert pipe.last_run.lsd is not None and reason in pipe.morse_summary()


def test_a_dot_may_call_dash(make_pipe):
    pipe = make_pipe()

    def run(**options):
        return pipe(generator=torch.Generator().manual_seed(0), output_type="pt", **options).images

    def dot(sample, timestep, jump):
        return pipe.unet(sample, timestep).sample - jump.model_output

    expected = run(num_inference_steps=4)
    enable_morse(pipe, dot)
    torch.testing.assert_close(run(plan="DooD"), expected, rtol=1e-3, atol=1e-4)
    assert counted(pipe) == (2, 2) and pipe.last_run.fallbacks == {}


def test_kinds_of_results():
    tensor, other = torch.ones(2), torch.zeros(2)
    result, container = result_of(tensor)
    assert result is tensor and container(other) is other
    result, container = result_of((tensor,))
    assert result is tensor and container(other) == (other,)
    output_class = diffusers.models.unets.unet_2d.UNet2DOutput
    result, container = result_of(output_class(sample=tensor))
    assert result is tensor and container(other).sample is other
    assert result_of((tensor, other)) is None and result_of(([tensor],)) is None
    assert result_of((tensor, None))[0] is tensor


@pytest.mark.parametrize("names", [("sample", "timestep"), ("hidden_states", "timesteps")])
def test_arguments_are_taken_apart_by_name(names):
    sample, timestep = names

    class Denoiser(nn.Module):
        exec(f"def forward(self, {sample}, {timestep}, text=None, mask=None, **kwargs): pass")

    x, text = torch.ones(2), torch.zeros(3)
    call = take_apart(Denoiser(), (x, 5, text), {"mask": None, "more": 1, "return_dict": False})
    assert call.sample is x and call.timestep == 5
    assert call.conditions.keys() == {"text", "more"} and call.conditions["text"] is text
    assert take_apart(Denoiser(), ([x], 5), {}) is None


class TestSubclasses:
    """Users' own, which put something around diffusers' method, are planned by what that takes."""

    class Everything:
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    class Named:
        def __call__(self, image=None, **options):
            return super().__call__(image=image, **options)

    class Styled:
        def __call__(self, style="plain", *args, **kwargs):
            return super().__call__(*args, **kwargs)

    @pytest.mark.parametrize("around", [Everything, Named, Styled])
    def test_of_pipelines(self, around):
        base = diffusers.StableDiffusionImg2ImgPipeline
        pipe = stable_diffusion(base, text_unet())
        usual = {**text_inputs(), "image": picture()}
        expected = latents(pipe, num_inference_steps=5, **usual)
        pipe.__class__ = type("Own", (around, base), {})
        enable_morse(pipe, own_dot)
        # 5 steps of which `strength`, .8 if not given, leaves 4.
        assert torch.equal(latents(pipe, plan="DDDD", **usual), expected)
        latents(pipe, num_dash_steps=2, num_dot_steps=2, **usual)
        assert counted(pipe) == (2, 2) and not pipe.last_run.fallbacks

    def test_arguments_by_place(self):
        base = diffusers.StableDiffusionPipeline
        pipe = stable_diffusion(type("Own", (self.Everything, base), {}), text_unet())
        enable_morse(pipe, own_dot)
        assert pipe._name_arguments(("a boat", 16), {"width": 8}) == {
            "prompt": "a boat", "height": 16, "width": 8
        }  # fmt: skip
        pipe.__class__ = type("Own", (self.Named, base), {})
        enable_morse(pipe, own_dot)
        with pytest.raises(TypeError, match="too many positional"):
            pipe("picture", "a boat", plan="DoD")

    def test_a_method_put_in_the_place_of_another(self, monkeypatch):
        base = diffusers.DDPMPipeline
        assert "image" not in find_signature(base, "__call__").parameters
        monkeypatch.setattr(base, "__call__", lambda self, image: None)
        assert list(find_signature(base, "__call__").parameters) == ["self", "image"]

    def test_of_denoisers(self):
        class Own(diffusers.UNet2DConditionModel):
            def forward(self, *args, **kwargs):
                return super().forward(*args, **kwargs)

        pipe = stable_diffusion(diffusers.StableDiffusionPipeline, text_unet())
        dot, usual = make_dot(pipe.unet), {**text_inputs(), "height": 16, "width": 16}
        enable_morse(pipe, dot)
        expected = latents(pipe, plan="DoD", **usual)
        pipe.unet.__class__ = Own
        enable_morse(pipe, dot)
        assert torch.equal(latents(pipe, plan="DoD", **usual), expected)
        assert counted(pipe) == (2, 1) and not pipe.last_run.fallbacks


# Text models, decoders, up-samplers; UnCLIP, whose parts have schedulers of their own; Versatile
# Diffusion's two UNets in one; what evaluates no denoiser.
NOT_SUPPORTED = {
    "DiffusionGemmaPipeline",
    "FluxPriorReduxPipeline",
    "LLaDA2Pipeline",
    "LTX2LatentUpsamplePipeline",
    "LTX2VideoDiffusionDecodePipeline",
    "LTXLatentUpsamplePipeline",
    "RFD4ProteinaPipeline",
    "UnCLIPImageVariationPipeline",
    "UnCLIPPipeline",
    "VersatileDiffusionDualGuidedPipeline",
    "VersatileDiffusionImageVariationPipeline",
    "VersatileDiffusionPipeline",
    "VersatileDiffusionTextToImagePipeline",
}


@pytest.mark.slow
def test_diffusers_own_pipelines():
    """Fails where a release of diffusers brings a pipeline whose denoiser we don't look for."""
    found, missing = set(), set()
    for name in dir(diffusers):
        cls = getattr(diffusers, name) if name.endswith("Pipeline") else None
        base = diffusers.DiffusionPipeline
        if not inspect.isclass(cls) or not issubclass(cls, base) or cls is base:
            continue
        parts = inspect.signature(cls.__init__).parameters
        known = any(part in parts for group in _GROUPS for part in group)
        (found if known and "scheduler" in parts else missing).add(name)
    assert missing == NOT_SUPPORTED and len(found) >= 270

import inspect
import json
import warnings

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ConfigMixin, DDPMPipeline, DiffusionPipeline, ModelMixin, PNDMScheduler
from tiny_pipelines import loop_pipeline
from tiny_text import sd3_pipeline, tokenizer

from morse import MorseDot, MorsePipeline, enable_morse
from morse.rates import adds_noise
from morse.schedulers import SCHEDULERS, check_scheduler, make_scheduler


def sample(pipe, **kwargs):
    generator = torch.Generator().manual_seed(0)
    return pipe(batch_size=2, generator=generator, output_type="pt", **kwargs).images


@pytest.fixture
def saved(make_pipe, make_dot, tmp_path):
    """A saved pipeline with its Dot, and an image of it."""
    pipe = make_pipe()
    enable_morse(pipe, make_dot(pipe.unet))
    pipe.save_pretrained(tmp_path / "pipe")
    return tmp_path / "pipe", sample(pipe, plan="DooDo")


def test_save_and_load(saved):
    path, expected = saved
    pipe = MorsePipeline.from_pretrained(path)
    assert isinstance(pipe, DDPMPipeline) and isinstance(pipe.dot, MorseDot)
    assert torch.equal(sample(pipe, plan="DooDo"), expected)
    assert pipe.last_run.num_dot == 3


def test_the_folder_is_one_of_plain_diffusers_and_a_dot(saved):
    path, _ = saved
    index = json.loads((path / "model_index.json").read_text())
    assert index["_class_name"] == "DDPMPipeline" and index["dot"] == [None, "MorseDot"]


def test_components_that_a_pipeline_was_saved_without(tmp_path):
    sd3_pipeline().save_pretrained(tmp_path)
    own = tokenizer()
    pipe = MorsePipeline.from_pretrained(tmp_path, tokenizer_3=own)
    assert pipe.text_encoder_3 is None and pipe.tokenizer_3 is own


def test_weights_that_are_not_in_safetensors(saved):
    path = saved[0]
    weights = path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(OSError, match=r'DDPMPipeline.from_pretrained.*save_pretrained."converted"'):
        MorsePipeline.from_pretrained(path)


def test_components_of_an_enabled_pipeline(saved):
    path, _ = saved
    pipe = MorsePipeline.from_pretrained(path)
    assert set(pipe.components) == {"unet", "scheduler", "dot"}
    pipe.to(dtype=torch.float64)
    assert pipe.dot.dtype == pipe.unet.dtype == torch.float64
    assert sample(pipe, plan="DoD").dtype == torch.float64


def test_a_separate_dot_and_a_named_scheduler(make_pipe, make_dot, tmp_path):
    bare = make_pipe()
    bare.save_pretrained(tmp_path / "base")
    make_dot(bare.unet).save_pretrained(tmp_path / "dot")
    pipe = MorsePipeline.from_pretrained(
        tmp_path / "base", dot=tmp_path / "dot", scheduler="dpmsolver++"
    )
    assert type(pipe.scheduler).__name__ == "DPMSolverMultistepScheduler"
    sample(pipe, plan="DoDo")
    assert pipe.last_run.num_dot == 2
    without = MorsePipeline.from_pretrained(tmp_path / "base")
    assert without.dot is None
    assert torch.equal(sample(without, num_inference_steps=3), sample(bare, num_inference_steps=3))


def test_half_precision(saved):
    pipe = MorsePipeline.from_pretrained(saved[0], dtype=torch.bfloat16)
    assert pipe.unet.dtype == pipe.dot.dtype == torch.bfloat16
    assert sample(pipe, plan="DoD").isfinite().all()


@pytest.mark.parametrize("name", ["ddim", "DDIMScheduler", "dpmsolver++", "DPM", "k-lms"])
def test_scheduler_names(make_pipe, name):
    config = make_pipe().scheduler.config
    if name in ("DPM", "k-lms"):
        with pytest.raises(ValueError, match=f"scheduler='{name}' is unknown; use one of .*ddim"):
            make_scheduler(name, config)
    else:
        assert make_scheduler(name, config).config.timestep_spacing == "trailing"


def test_spacing_is_the_new_classes_unless_it_was_chosen():
    default, chosen = PNDMScheduler().config, PNDMScheduler(timestep_spacing="leading").config
    for name, spacing in (("dpmsolver++", "linspace"), ("ddim", "leading")):
        assert make_scheduler(name, default).config.timestep_spacing == spacing
        assert make_scheduler(name, chosen).config.timestep_spacing == "leading"


def test_clipping_is_what_the_pipelines_own_scheduler_says_of_it():
    for own in (diffusers.DPMSolverMultistepScheduler(), diffusers.EulerDiscreteScheduler()):
        for name in ("ddim", "ddpm", "DDIMParallelScheduler"):
            assert not make_scheduler(name, own.config).config.clip_sample
    pixels = make_scheduler("leapfrog", diffusers.DDPMScheduler().config)
    assert make_scheduler("ddim", pixels.config).config.clip_sample


def test_thresholding_that_a_scheduler_has_no_word_for_is_told():
    config = diffusers.DDPMScheduler(thresholding=True).config
    with pytest.warns(UserWarning, match="scheduler='leapfrog' has no thresholding"):
        other = make_scheduler("leapfrog", config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make_scheduler("dpmsolver++", other.config).config.thresholding


def test_a_schedulers_name_says_which_solver_whatever_was_there_before(make_pipe):
    config = make_pipe().scheduler.config
    for name in SCHEDULERS:
        for before in ("sde-dpmsolver++", "dpmsolver++1", "pfdiff", "leapfrog-dense"):
            other = make_scheduler(before, config)
            if "fitted_steps" in other.config:
                other.register_to_config(fitted_steps=[[0.5, 0.5, 0.0, 0.0]])
            scheduler, plain = (make_scheduler(name, own) for own in (other.config, config))
            for option in inspect.signature(type(scheduler)).parameters:
                assert scheduler.config[option] == plain.config[option]
            assert adds_noise(scheduler) == adds_noise(make_scheduler(name, config))


def test_errors(saved, build_unet, tmp_path):
    path, _ = saved
    with pytest.raises(ValueError, match="use_safetensors must be True"):
        MorsePipeline.from_pretrained(path, use_safetensors=False)
    with pytest.raises(TypeError, match="from_pretrained"):
        MorsePipeline()
    MorseDot.from_dash(build_unet(seed=7)).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="another Dash"):
        MorsePipeline.from_pretrained(path, dot=tmp_path / "other")
    weights = path / "dot" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises((ValueError, OSError), match=r"diffusion_pytorch_model\.safetensors"):
        MorsePipeline.from_pretrained(path)


@pytest.mark.parametrize("dtype", ["auto", {"unet": torch.float16, "default": torch.float32}])
def test_a_sparse_dot_follows_whatever_dtype_is_asked_for(make_pipe, make_dot, tmp_path, dtype):
    pipe = make_pipe()
    dot = make_dot(pipe.unet)
    dot.register_to_config(sparse=True)
    enable_morse(pipe, dot).save_pretrained(tmp_path)
    loaded = MorsePipeline.from_pretrained(tmp_path, torch_dtype=dtype)
    assert loaded.dot.dtype == loaded.unet.dtype
    assert MorseDot.from_pretrained(tmp_path, subfolder="dot", torch_dtype=dtype).config.sparse


class OwnDot(ModelMixin, ConfigMixin):
    config_name = "config.json"

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.zeros(()))

    def forward(self, sample, timestep, jump):
        return self.scale * sample


def test_a_dot_of_the_users_own_class(make_pipe, make_dot, tmp_path):
    pipe = make_pipe()
    enable_morse(pipe, OwnDot()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"a Dot of the class 'OwnDot', .* pass dot="):
        MorsePipeline.from_pretrained(tmp_path)
    loaded = MorsePipeline.from_pretrained(tmp_path, dot=OwnDot())
    sample(loaded, plan="Do")
    assert loaded.last_run.num_dot == 1


def test_a_refused_dot_leaves_the_scheduler(make_pipe, build_unet):
    pipe = make_pipe()
    before = pipe.scheduler
    with pytest.raises(ValueError, match="another Dash"):
        MorsePipeline.from_pipe(pipe, MorseDot.from_dash(build_unet(seed=7)), "dpmsolver++")
    assert pipe.scheduler is before


def test_from_pipe_takes_a_pipeline_in_memory(make_pipe, make_dot):
    pipe = make_pipe()
    same = MorsePipeline.from_pipe(pipe, make_dot(pipe.unet), scheduler="dpmsolver++")
    assert same is pipe and isinstance(pipe, DiffusionPipeline)
    sample(pipe, plan="Do")
    assert pipe.last_run.num_dot == 1


def test_the_call_has_the_pipelines_own_signature_with_what_is_added(make_pipe):
    bare = make_pipe()
    assert not isinstance(bare, MorsePipeline)
    own = list(inspect.signature(bare.__call__).parameters.values())
    pipe = MorsePipeline.from_pipe(bare)
    assert isinstance(pipe, MorsePipeline)
    found = list(inspect.signature(pipe.__call__).parameters.values())
    assert found[: len(own)] == own
    added = ["lsd", "num_dash_steps", "num_dot_steps", "plan"]
    assert [each.name for each in found[len(own) :]] == added
    assert all(each.kind is each.KEYWORD_ONLY for each in found[len(own) :])
    with pytest.warns(UserWarning, match="has no dot") as caught:
        sample(pipe, lsd=2)
    assert caught[0].filename == __file__  # the caller's line


def test_from_pipe_takes_where_a_dot_is_saved(make_pipe, make_dot, tmp_path):
    pipe = make_pipe()
    make_dot(pipe.unet).save_pretrained(tmp_path)
    for place in (tmp_path, str(tmp_path)):
        sample(MorsePipeline.from_pipe(pipe, place), plan="Do")
        assert pipe.last_run.num_dot == 1 and isinstance(pipe.dot, MorseDot)


def test_a_revision_is_not_that_of_another_repositorys_dot(saved, monkeypatch):
    path, _ = saved
    load, asked = MorseDot.from_pretrained, []

    def watched(place, **options):
        asked.append(options.get("revision"))
        return load(place, **options)

    monkeypatch.setattr(MorseDot, "from_pretrained", watched)
    for dot in (None, path / "dot"):
        MorsePipeline.from_pretrained(path, dot=dot, revision="v2")
    assert asked == ["v2", None]


def test_first_order_dpmsolver_is_ddim_where_the_steps_divide_the_schedule(make_pipe):
    images = [sample(make_pipe(name), num_inference_steps=8) for name in ("ddim", "dpmsolver++1")]
    torch.testing.assert_close(*images, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["heun", "unipc", "euler", "euler-ancestral", "pndm", "deis"])
def test_a_scheduler_that_the_pipeline_cannot_run_is_refused(make_pipe, name):
    with pytest.raises(ValueError, match=r"Scheduler does not work in diffusers' DDPMPipeline"):
        MorsePipeline.from_pipe(make_pipe(), scheduler=name)


@pytest.mark.parametrize(
    ("own", "other"),
    [
        ("EDMEulerScheduler", "leapfrog"),
        ("DDIMScheduler", diffusers.EDMEulerScheduler()),
        ("DDIMScheduler", diffusers.IPNDMScheduler()),
        ("DDIMScheduler", diffusers.DDIMScheduler(beta_schedule="scaled_linear")),
        ("CogVideoXDDIMScheduler", "ddim"),  # whose `snr_shift_scale` DDIM has not
    ],
)
def test_of_other_noise_levels_is_warned(own, other):
    pipe = loop_pipeline(torch.nn.Identity(), getattr(diffusers, own)())
    with pytest.warns(UserWarning, match=rf"other noise levels than the pipeline's {own}"):
        MorsePipeline.from_pipe(pipe, scheduler=other)


@pytest.mark.filterwarnings("error:scheduler .* has other noise levels")
def test_the_same_noise_levels_are_not_warned_of(make_pipe):
    class OwnScheduler(diffusers.EDMEulerScheduler):
        """One of a user's, without a table of alphas."""

    own = make_pipe().scheduler
    pipe = loop_pipeline(torch.nn.Identity(), own)
    for name in SCHEDULERS:
        check_scheduler(pipe, make_scheduler(name, own.config))
    karras = diffusers.DPMSolverMultistepScheduler.from_config(own.config, use_karras_sigmas=True)
    zero_snr = diffusers.DDIMScheduler.from_config(own.config, rescale_betas_zero_snr=True)
    for scheduler in (karras, zero_snr, OwnScheduler()):
        check_scheduler(pipe, scheduler)
    check_scheduler(loop_pipeline(torch.nn.Identity(), zero_snr), own)
    edm = loop_pipeline(torch.nn.Identity(), diffusers.EDMDPMSolverMultistepScheduler())
    check_scheduler(edm, diffusers.EDMEulerScheduler())


def test_a_schedulers_class_is_no_scheduler(make_pipe):
    with pytest.raises(TypeError, match="is the class DDIMScheduler; give its name or an object"):
        MorsePipeline.from_pipe(make_pipe(), scheduler=diffusers.DDIMScheduler)


@pytest.mark.supports("pipeline", "DDIMPipeline")
def test_diffusers_own_ddim_pipeline(dash, make_dot):
    from diffusers import DDIMPipeline, DDIMScheduler

    pipe = DDIMPipeline(dash, DDIMScheduler(clip_sample=False, timestep_spacing="trailing"))
    pipe.set_progress_bar_config(disable=True)

    def images(**plan):
        return pipe(generator=torch.Generator().manual_seed(0), output_type="np", **plan).images

    with pytest.raises(
        ValueError, match=r"LeapfrogScheduler does not work in .* use ddim, or make"
    ):
        MorsePipeline.from_pipe(pipe, scheduler="leapfrog")
    expected = images(num_inference_steps=5)
    enable_morse(pipe, make_dot(dash))
    assert np.array_equal(images(plan="DDDDD"), expected)
    with_dot = images(plan="DooDo")
    assert (pipe.last_run.num_dash, pipe.last_run.num_dot) == (2, 3)
    assert np.isfinite(with_dot).all() and not np.array_equal(with_dot, expected)
    assert np.array_equal(images(plan="DooDo"), with_dot)

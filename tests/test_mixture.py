"""Runs that begin with the estimates of a Gaussian mixture instead of a network's."""

import copy
from types import SimpleNamespace

import pytest
import torch
from attached import latents, text_pipe
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.utils import BaseOutput
from tiny_pipelines import loop_pipeline
from torch import distributions, nn
from torch.testing import assert_close

from morse import LeapfrogScheduler, MorseDot, enable_morse
from morse.denoisers import Call, Denoiser
from morse.dot.mixture import GaussianMixture
from morse.guess import guess_estimate
from morse.plan import MorsePlan
from morse.saved_plans import SavedPlan, find_saved_plan
from morse.schedulers import make_scheduler
from morse.training.config import TrainDotConfig
from morse.training.loop import build_dot

SHAPE = (1, 8, 8)


def clusters(count=200, shape=SHAPE):
    """Samples around two pictures, most of whose spread is along one direction each."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(2, *shape, generator=generator) * 2 - 1
    directions = torch.nn.functional.normalize(torch.randn(2, 1, 64, generator=generator), dim=2)
    along = torch.randn(2, count, 1, generator=generator) * directions
    noise = 0.1 * torch.randn(2, count, 64, generator=generator)
    return (pictures.reshape(2, 1, 64) + along + noise).reshape(-1, *shape), pictures, directions


@pytest.fixture(scope="module")
def mixture():
    return GaussianMixture.fit(clusters()[0], num_components=2, rank=3)


def posterior_mean(mixture, noisy, alpha, sigma):
    """E[x_0 | x_t] by Tweedie's formula from torch's own density of x_t, in float64."""
    means = mixture.means.flatten(1).double()
    directions = mixture.directions.flatten(2).double()
    rest = mixture.rest.double()[:, None, None]
    covariances = rest * torch.eye(means.shape[1]).double() + torch.einsum(
        "kri,kr,krj->kij", directions, mixture.variances.double() - rest[:, :, 0], directions
    )
    noise = sigma**2 * torch.eye(means.shape[1]).double()
    density = distributions.MixtureSameFamily(
        distributions.Categorical(mixture.weights.double()),
        distributions.MultivariateNormal(alpha * means, alpha**2 * covariances + noise),
    )
    flat = noisy.flatten(1).double().requires_grad_()
    (score,) = torch.autograd.grad(density.log_prob(flat).sum(), flat)
    return ((flat + sigma**2 * score) / alpha).detach().reshape(noisy.shape).float()


@pytest.mark.parametrize("sigma", [0.05, 0.5, 0.9, 0.9999])
def test_the_estimate_is_the_posterior_mean(mixture, sigma):
    alpha = (1 - sigma**2) ** 0.5
    clean = clusters()[0][::40]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    noisy = alpha * clean + sigma * noise
    rates = (torch.tensor(alpha), torch.tensor(sigma))
    expected = posterior_mean(mixture, noisy, alpha, sigma)
    assert_close(mixture(noisy, rates), expected, atol=2e-4, rtol=1e-3)
    assert not torch.allclose(expected, clean, atol=0.05)


def test_each_image_may_have_rates_of_its_own(mixture):
    noisy = torch.randn(2, *SHAPE)
    rates = (torch.tensor([0.8, 0.1]).reshape(2, 1, 1, 1), torch.tensor([0.6, 0.99]))
    for i in range(2):
        own = (rates[0][i], rates[1][i])
        assert_close(mixture(noisy, rates)[i : i + 1], mixture(noisy[i : i + 1], own))
    assert mixture(noisy.half(), rates).dtype == torch.half


def test_the_estimate_is_made_where_the_sample_is(mixture):
    """Model offloading leaves the mixture on the CPU; "meta" stands for the accelerator."""
    noisy, rates = torch.empty(2, *SHAPE, device="meta"), (torch.tensor(0.6), torch.tensor(0.8))
    assert mixture(noisy, rates).device.type == "meta"


def test_means_directions_and_variances_are_found(mixture):
    _, pictures, directions = clusters()
    order = torch.cdist(pictures.flatten(1), mixture.means.flatten(1)).argmin(1)
    assert sorted(order.tolist()) == [0, 1]
    assert_close(mixture.means[order], pictures, atol=0.3, rtol=0)
    along = (mixture.directions[order, 0].flatten(1) * directions[:, 0]).sum(1).abs()
    assert bool((along > 0.98).all())
    assert_close(mixture.variances[:, 0], torch.ones(2), atol=0.25, rtol=0)
    assert_close(mixture.rest, torch.full((2,), 0.01), atol=0.002, rtol=0)
    assert_close(mixture.weights, torch.full((2,), 0.5))


def test_the_whole_variance_is_kept():
    """A mixture of one: its covariance has the trace of the samples' own."""
    samples = clusters()[0]
    one = GaussianMixture.fit(samples, num_components=1, rank=2)
    trace = one.variances.sum() + one.rest[0] * (64 - 2)
    assert_close(trace, samples.flatten(1).var(0).sum())


def test_a_cluster_may_span_fewer_directions_than_asked_for():
    few = torch.cat([torch.zeros(2, *SHAPE), torch.ones(3, *SHAPE)])
    few += 1e-3 * torch.randn(few.shape, generator=torch.Generator().manual_seed(0))
    mixture = GaussianMixture.fit(few, num_components=2, rank=4)
    rates = (torch.tensor(0.6), torch.tensor(0.8))
    assert_close(mixture(few * 0.6, rates), few.round(), atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianMixture.fit(torch.zeros(3, *SHAPE), 2), "samples are 3 for .* = 2"),
        (lambda: GaussianMixture.fit(torch.full((9, *SHAPE), torch.nan), 2), "finite"),
        (lambda: GaussianMixture(0, 2, SHAPE), "num_components = 0"),
        (lambda: GaussianMixture(2, -1, SHAPE), "rank = -1"),
    ],
)
def test_wrong_mixtures(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class Exact(nn.Module):
    """A denoiser that is the mixture itself, in a model that diffusers' pipelines call."""

    def __init__(self, unet, mixture, scheduler):
        super().__init__()
        self.config, self.mixture, self.scheduler = unet.config, mixture, scheduler
        self.dtype, self.device, self.calls = torch.float32, torch.device("cpu"), 0

    def forward(self, sample, timestep, return_dict=True):
        self.calls += 1
        alpha = self.scheduler.alphas_cumprod[int(timestep)].sqrt()
        sigma = (1 - alpha**2).sqrt()
        clean = self.mixture(sample, (alpha, sigma))
        predicted = {
            "epsilon": (sample - alpha * clean) / sigma,
            "sample": clean,
            "v_prediction": (alpha * sample - clean) / sigma,
        }[self.scheduler.config.prediction_type]
        return (predicted,)


class TestRuns:
    """Pipelines whose Dot has a mixture."""

    @pytest.fixture
    def unet(self, build_unet):
        return build_unet(channels=(8, 16), sample_size=8)

    @pytest.fixture
    def dot(self, unet, mixture):
        return MorseDot.from_dash(
            unet, num_down_blocks=1, lora_rank=2, speed_ratio=4.0
        ).set_mixture(mixture)

    def call(self, pipe, **kwargs):
        generator = torch.Generator().manual_seed(0)
        return pipe(batch_size=2, generator=generator, **kwargs).images

    @pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
    @pytest.mark.parametrize("name", ["leapfrog", "ddim", "dpmsolver++", "unipc", "euler"])
    def test_it_answers_as_its_exact_denoiser_would(self, unet, mixture, name, kind):
        """Every solver, whose input's noise each tells in its own way."""
        config = DDPMScheduler(
            clip_sample=False, timestep_spacing="trailing", prediction_type=kind
        ).config
        scheduler = make_scheduler(name, config)
        pipe = loop_pipeline(Exact(unet, mixture, DDPMScheduler.from_config(config)), scheduler)

        def dot(sample, timestep, jump):
            return torch.zeros_like(jump.model_output)

        dot.mixture = mixture
        pipe = enable_morse(pipe, dot)
        expected, calls = self.call(pipe, num_inference_steps=6), pipe.unet.calls
        found = self.call(pipe, plan="gggDDD")
        assert_close(found, expected, atol=2e-3, rtol=0)
        assert pipe.unet.calls - calls == 3
        assert (pipe.last_run.num_gaussian, pipe.last_run.num_dash) == (3, 3)
        assert pipe.last_run.lsd == 3.0 and "3 of the mixture" in pipe.morse_summary()

    def test_autocast_does_not_round_it(self, unet, dot):
        scheduler = LeapfrogScheduler()
        noisy = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
        arguments = Denoiser("unet", unet, dot), Call(noisy, 999, {}, False), scheduler, 0
        (expected,) = guess_estimate(*arguments)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(guess_estimate(*arguments)[0], expected)

    def test_it_has_the_samples_dtype_and_the_denoisers_container(self, unet, dot):
        scheduler, noisy = LeapfrogScheduler(), torch.randn(2, *SHAPE).half()
        for return_dict in (False, True):
            call = Call(noisy, 999, {}, return_dict)
            found = guess_estimate(Denoiser("unet", unet, dot), call, scheduler, 0)
            assert isinstance(found, BaseOutput if return_dict else tuple)
            assert found[0].dtype == torch.half and found[0].shape == noisy.shape

    @pytest.mark.parametrize(("channels", "return_dict"), [(2, False), (1, None)])
    def test_what_returns_more_than_an_estimate_is_not_answered(self, dot, channels, return_dict):
        """A learned variance beside it, or a container that is not known."""
        module = SimpleNamespace(config=SimpleNamespace(out_channels=channels))
        call = Call(torch.zeros(2, *SHAPE), 999, {}, return_dict)
        found = guess_estimate(Denoiser("unet", module, dot), call, LeapfrogScheduler(), 0)
        assert found == "it returns more than an estimate of the sample"

    def test_dot_goes_on_from_dash_not_from_the_mixture(self, unet, dot):
        pipe = enable_morse(loop_pipeline(unet, LeapfrogScheduler()), dot)
        self.call(pipe, plan="ggDoDo")
        run = pipe.last_run
        assert not run.fallbacks and (run.num_gaussian, run.num_dash, run.num_dot) == (2, 2, 2)
        assert run.lsd == pytest.approx(2 + 2 / 4)

    def test_it_begins_what_a_small_budget_is_spent_on(self, unet, dot):
        uniform = str(MorsePlan.from_budget(6, 4.0))
        pipe = enable_morse(loop_pipeline(unet, LeapfrogScheduler()), dot)
        self.call(pipe, lsd=6)
        assert str(pipe.last_run.plan) == pipe.plan_for(6).plan == f"ggg{uniform}"
        assert pipe.last_run.lsd <= 6 and not pipe.last_run.fallbacks
        self.call(pipe, lsd=6, plan="uniform")
        assert str(pipe.last_run.plan) == uniform
        begun = {lsd: pipe.plan_for(lsd).plan.count("g") for lsd in (10, 10.5, 14, 14.5)}
        assert begun == {10: 3, 10.5: 2, 14: 2, 14.5: 0}
        assert pipe.plan_for(6, num_inference_steps=len(uniform)).plan == uniform
        pipe.scheduler = DDPMScheduler(clip_sample=False)
        assert "g" not in pipe.plan_for(6).plan
        pipe.scheduler = DDIMScheduler(clip_sample=False)
        assert "g" in pipe.plan_for(6, eta=0.0).plan and "g" not in pipe.plan_for(6, eta=0.5).plan
        dot.register_to_config(plans={"LeapfrogScheduler": [SavedPlan(6, "DDoDo").to_config()]})
        pipe.scheduler = LeapfrogScheduler()
        assert pipe.plan_for(6).plan == "DDoDo" + "D" * 2
        assert "g" not in enable_morse(pipe, dot.set_mixture(None)).plan_for(5).plan

    def test_a_budget_of_a_solver_that_makes_odd_runs_alone(self, unet, dot):
        config = DDPMScheduler(clip_sample=False, timestep_spacing="trailing").config
        pipe = enable_morse(loop_pipeline(unet, make_scheduler("heun", config)), dot)
        for lsd in (5, 6):
            self.call(pipe, lsd=lsd)
            assert str(pipe.last_run.plan).startswith("gggD") and pipe.last_run.lsd <= lsd

    def test_saved_with_the_dot(self, unet, dot, tmp_path):
        pipe = enable_morse(loop_pipeline(unet, LeapfrogScheduler()), dot)
        expected = self.call(pipe, plan="ggDD")
        assert not torch.allclose(expected, self.call(pipe, plan="DDDD"), atol=1e-3)
        dot.save_pretrained(tmp_path)
        other = enable_morse(
            loop_pipeline(unet, LeapfrogScheduler()), MorseDot.from_pretrained(tmp_path)
        )
        assert torch.equal(self.call(other, plan="ggDD"), expected)

    def test_training_goes_on_with_it(self, unet, dot, tmp_path):
        dot.save_pretrained(tmp_path)
        config = TrainDotConfig(
            pretrained_model_name_or_path="-", train_data_dir=tmp_path, output_dir=tmp_path,
            init_from=tmp_path, num_down_blocks=1, lora_rank=2,
        )  # fmt: skip
        assert torch.equal(build_dot(unet, config).mixture.means, dot.mixture.means)
        assert dot.set_mixture(None).config.mixture_size is None

    def test_guidance_of_two_branches(self):
        """Both halves of the batch get one estimate, in a tuple as the pipeline asks for."""
        pipe = text_pipe()
        shape = latents(pipe, num_inference_steps=1).shape[1:]
        samples = torch.randn(40, *shape, generator=torch.Generator().manual_seed(0))
        dot = MorseDot.from_dash(pipe.unet, num_down_blocks=1, lora_rank=2, speed_ratio=4.0)
        pipe = enable_morse(pipe, dot.set_mixture(GaussianMixture.fit(samples, 2, 2)))
        assert latents(pipe, plan="ggDo").isfinite().all()
        run = pipe.last_run
        assert (run.num_gaussian, run.lsd) == (2, 1.25) and not run.fallbacks

    def test_samples_of_another_size_are_dashs(self, unet, dot):
        dot.set_mixture(GaussianMixture(2, 2, (1, 16, 16)))
        pipe = enable_morse(loop_pipeline(unet, LeapfrogScheduler()), dot)
        expected = self.call(pipe, plan="DDD")
        with pytest.warns(UserWarning, match="1 estimates of the Gaussian mixture and Dash made"):
            assert torch.equal(self.call(pipe, plan="gDD"), expected)
        assert dict(pipe.last_run.fallbacks) == {
            "the Gaussian mixture is of samples of another size": 1
        }

    def test_a_plan_with_a_mixture_needs_one(self, unet, dot):
        pipe = enable_morse(loop_pipeline(unet, LeapfrogScheduler()), dot.set_mixture(None))
        with pytest.raises(ValueError, match=r"'ggDD' begins .* --mixture_images 1024"):
            self.call(pipe, plan="ggDD")

    def test_fitted_steps_get_no_further_evaluations(self, unet):
        rows = [[999, 0.5, 0, 0], [800, 0.5, 0, 0], [600, 0.5, 0, 0], [300, 1, 0, 0]]
        saved = SavedPlan(2, "ggDD", {"fitted_steps": rows}).to_config()
        found = find_saved_plan({"LeapfrogScheduler": [saved]}, LeapfrogScheduler(), 3, 4.0)
        assert found.plan == "ggDD"


def test_plans():
    plan = MorsePlan.from_string("ggDoDo")
    assert str(plan) == "ggDoDo" and plan.num_gaussian == 2 and len(plan) == 6
    assert plan.cost(4.0) == MorsePlan.from_string("DoDo").cost(4.0)
    assert MorsePlan.from_string("DoDo").num_gaussian == 0


@pytest.mark.parametrize(
    ("plan", "message"),
    [("gg", "must start with"), ("goD", "must start with"), ("gDgD", 'before "dash" only')],
)
def test_wrong_plans(plan, message):
    with pytest.raises(ValueError, match=message):
        MorsePlan.from_string(plan)


def test_it_is_moved_with_a_model_in_channels_last(mixture):
    moved = nn.Sequential(copy.deepcopy(mixture)).to(memory_format=torch.channels_last)[0]
    noisy, rates = torch.randn(2, *SHAPE), (torch.tensor(0.6), torch.tensor(0.8))
    assert_close(moved(noisy, rates), mixture(noisy, rates), rtol=0, atol=0)
    assert moved.double().directions.dtype == torch.float64

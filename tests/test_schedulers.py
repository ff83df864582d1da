"""Every scheduler: all Dash is bit-identical, planned numbers are made, runs repeat."""

import importlib.util
from types import SimpleNamespace

import diffusers
import pytest
import torch
from pipeline_checks import make_dot
from tiny_pipelines import loop_pipeline

import morse
from morse import disable_morse, enable_morse
from morse.plan import MorsePlan
from morse.steps import count_evaluations, find_exact_steps, find_steps, shorten_plan

EPSILON_X0_V = ("epsilon", "sample", "v_prediction")
EPSILON_V = ("epsilon", "v_prediction")
# Class name, its settings, the prediction types it takes (None: it has no such setting), and the
# evaluations of the test's plan, which a second-order scheduler makes in odd numbers only.
CASES = [
    ("DDIM", {}, EPSILON_X0_V, 5),
    ("DDIMParallel", {}, ("epsilon",), 5),
    ("DDPM", {}, EPSILON_X0_V, 5),
    ("DDPM", {"variance_type": "fixed_large"}, ("epsilon",), 5),
    ("DPMSolverMultistep", {}, EPSILON_X0_V, 5),
    ("DPMSolverMultistep", {"use_karras_sigmas": True, "solver_order": 3}, ("epsilon",), 5),
    ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}, EPSILON_X0_V, 5),
    ("DPMSolverMultistep", {"use_flow_sigmas": True}, ("flow_prediction",), 5),
    ("DPMSolverSinglestep", {}, EPSILON_X0_V, 5),
    ("DPMSolverSDE", {"noise_sampler_seed": 0}, EPSILON_V, 5),
    ("UniPCMultistep", {}, EPSILON_X0_V, 5),
    ("UniPCMultistep", {"use_flow_sigmas": True}, ("flow_prediction",), 5),
    ("EulerDiscrete", {}, EPSILON_X0_V, 5),
    ("EulerDiscrete", {"use_karras_sigmas": True}, ("epsilon",), 5),
    ("EulerAncestralDiscrete", {}, EPSILON_V, 5),
    ("LCM", {}, EPSILON_X0_V, 5),
    ("TCD", {}, EPSILON_X0_V, 5),
    ("HeunDiscrete", {}, EPSILON_X0_V, 5),
    ("KDPM2Discrete", {}, EPSILON_V, 5),
    ("KDPM2AncestralDiscrete", {}, EPSILON_V, 5),
    ("LMSDiscrete", {}, EPSILON_X0_V, 5),
    ("DEISMultistep", {}, EPSILON_X0_V, 5),
    ("PNDM", {"skip_prk_steps": True}, EPSILON_V, 5),
    ("PNDM", {"skip_prk_steps": False}, EPSILON_V, 15),
    ("SASolver", {}, EPSILON_X0_V, 5),
    ("IPNDM", {}, (None,), 5),
    ("EDMEuler", {}, EPSILON_V, 5),
    ("EDMDPMSolverMultistep", {}, EPSILON_V, 5),
    ("EDMDPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}, ("epsilon",), 5),
    ("FlowMatchEulerDiscrete", {}, (None,), 5),
    ("FlowMatchEulerDiscrete", {"stochastic_sampling": True}, (None,), 5),
    ("FlowMatchHeunDiscrete", {}, (None,), 5),
    ("Leapfrog", {}, EPSILON_X0_V, 5),
    ("FlowMatchLeapfrog", {"shift": 3.0}, (None,), 5),
]
PARAMETERS = [
    pytest.param(name, {**options, "prediction_type": kind} if kind else options, length,
                 id="-".join(map(str, [name, *options.values(), *([kind] if kind else [])])),
                 marks=pytest.mark.supports("scheduler", name))
    for name, options, kinds, length in CASES
    for kind in kinds
]  # fmt: skip
NEEDS = {"DPMSolverSDE": "torchsde", "LMSDiscrete": "scipy"}


def make(name, **options):
    package = NEEDS.get(name)
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"{name}Scheduler needs {package}, which is not installed")
    library = morse if "Leapfrog" in name else diffusers
    return getattr(library, f"{name}Scheduler")(**options)


def sample(pipe, **kwargs):
    generator = torch.Generator().manual_seed(0)
    return pipe(batch_size=2, generator=generator, **kwargs).images


@pytest.fixture(scope="module")
def unet(build_unet):
    return build_unet(channels=(8, 16), sample_size=8)


@pytest.fixture(scope="module")
def dot(unet):
    return make_dot(unet)


@pytest.mark.parametrize(("name", "options", "length"), PARAMETERS)
def test_scheduler(unet, dot, name, options, length):
    pipe = loop_pipeline(unet, make(name, **options))
    steps = find_exact_steps(pipe, {}, length)
    expected = sample(pipe, num_inference_steps=steps)
    enable_morse(pipe, dot)
    assert torch.equal(sample(pipe, plan="D" * length), expected)
    assert (pipe.last_run.num_dash, pipe.last_run.num_dot) == (length, 0)
    plan = MorsePlan.uniform(2, length - 2)
    images = sample(pipe, plan=plan)
    assert (pipe.last_run.num_dash, pipe.last_run.num_dot) == (2, length - 2)
    assert pipe.last_run.fallbacks == {}
    assert images.isfinite().all() and not torch.equal(images, expected)
    is_first = options.get("prediction_type") not in EPSILON_X0_V[1:]
    if is_first:  # what a run leaves in a scheduler is no matter of the prediction type
        assert torch.equal(sample(pipe, plan=plan), images)
    disable_morse(pipe)
    if is_first:
        assert torch.equal(sample(pipe, num_inference_steps=steps), expected)


class TestSteps:
    """The number of model evaluations and the number of steps are two things."""

    @pytest.fixture
    def make_loop(self, unet):
        return lambda name, **options: loop_pipeline(unet, make(name, **options))

    @pytest.mark.parametrize(
        ("name", "options", "length", "steps"),
        [
            ("DDIM", {}, 9, 9),
            ("HeunDiscrete", {}, 9, 5),
            ("KDPM2Discrete", {}, 31, 16),
            ("FlowMatchHeunDiscrete", {}, 1, 1),
            ("PNDM", {"skip_prk_steps": True}, 7, 6),
            ("PNDM", {"skip_prk_steps": False}, 31, 22),
            ("FlowMatchEulerDiscrete", {"use_dynamic_shifting": True}, 4, 4),
        ],
    )
    def test_exact(self, make_loop, name, options, length, steps):
        pipe = make_loop(name, **options)
        before = dict(pipe.scheduler.__dict__)
        assert find_exact_steps(pipe, {}, length) == steps
        assert find_steps(pipe, {}, length) == (steps, length)
        assert count_evaluations(pipe, {}, steps) == length
        assert pipe.scheduler.__dict__ == before

    @pytest.mark.parametrize(
        ("name", "options", "length", "nearest"),
        [
            ("HeunDiscrete", {}, 8, "7 or 9"),
            ("PNDM", {"skip_prk_steps": False}, 7, "13"),
            ("LCM", {}, 60, "50"),
        ],
    )
    def test_the_nearest_possible_plans_are_named(
        self, make_loop, dot, name, options, length, nearest
    ):
        pipe = enable_morse(make_loop(name, **options), dot)
        message = f"{length} evaluations, which {name}Scheduler in LoopPipeline .* {nearest}\\."
        with pytest.raises(ValueError, match=message):
            sample(pipe, plan="D" * length)

    def test_a_budget_takes_the_most_that_is_possible(self, make_loop, dot):
        pipe = enable_morse(make_loop("HeunDiscrete"), dot)
        pipe.speed_ratio = 4.0
        planned = MorsePlan.from_budget(4.5, 4.0)
        assert len(planned) == 9 and planned.num_dash == 3
        sample(pipe, lsd=4.5)
        assert pipe.last_run.plan == planned
        planned = MorsePlan.from_budget(4.3, 4.0)
        assert len(planned) == 8 and planned.num_dash == 3
        sample(pipe, lsd=4.3)
        assert str(pipe.last_run.plan) == str(MorsePlan.uniform(3, 4))
        pipe = enable_morse(make_loop("PNDM"), dot)
        pipe.speed_ratio = 1.0
        with pytest.raises(ValueError, match="as few as 4 evaluations; the fewest possible are 13"):
            sample(pipe, lsd=4)

    def test_given_steps_are_steps_and_the_plan_counts_evaluations(self, make_loop, dot):
        pipe = enable_morse(make_loop("HeunDiscrete"), dot)
        sample(pipe, num_dash_steps=3, num_inference_steps=4)
        assert (pipe.last_run.num_dash, pipe.last_run.num_dot) == (3, 4)
        with pytest.raises(ValueError, match="num_inference_steps=4 makes 7 evaluations but the"):
            sample(pipe, plan="DoDo", num_inference_steps=4)

    def test_arguments_may_be_positional(self, make_loop, dot):
        pipe = enable_morse(make_loop("DDIM"), dot)
        pipe(2, None, 5, num_dash_steps=2)
        assert str(pipe.last_run.plan) == "DoDoo"

    def test_speed_is_measured_with_a_second_order_scheduler(self, make_loop, dot):
        pipe = enable_morse(make_loop("HeunDiscrete"), dot)
        assert pipe.measure_speed_ratio(repeats=3).speed_ratio == pipe.speed_ratio > 0


@pytest.mark.parametrize(
    ("name", "arguments", "length"),
    [
        ("WanVideoToVideoPipeline", {"strength": 0.5}, 5),
        ("CogVideoXVideoToVideoPipeline", {"strength": 0.5}, 5),
        ("AnimateDiffVideoToVideoPipeline", {"strength": 0.5}, 5),
        ("AnimateDiffVideoToVideoPipeline", {"strength": 0.5, "enforce_inference_steps": True}, 10),
        ("LTXConditionPipeline", {"strength": 1.0, "denoise_strength": 0.5}, 5),
        ("LTXConditionPipeline", {"strength": 0.5, "denoise_strength": 1.0}, 10),
        ("StableDiffusionDiffEditPipeline", {"inpaint_strength": 0.5}, 5),
    ],
)
def test_what_other_pipelines_leave_out(name, arguments, length):
    pipe = object.__new__(type(name, (), {"get_timesteps": getattr(diffusers, name).get_timesteps}))
    pipe.config = {}
    flows = name.startswith(("Wan", "LTX"))
    kind = diffusers.FlowMatchEulerDiscreteScheduler if flows else diffusers.DDIMScheduler
    pipe.scheduler = kind()
    assert count_evaluations(pipe, {"timesteps": None, **arguments}, 10) == length


def test_an_early_end_takes_the_timestep_that_lies_on_it():
    pipe = SimpleNamespace(scheduler=diffusers.DDIMScheduler(), config={})
    assert count_evaluations(pipe, {"denoising_end": 0.7}, 10) == 7  # 900, 800, ..., 300
    assert pipe.scheduler.num_inference_steps is None  # a copy is asked


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        ({"max_timesteps": 1.57, "intermediate_timesteps": 1.3}, 2),
        ({"max_timesteps": 1.57, "intermediate_timesteps": None}, 4),
    ],
)
def test_the_clean_end_of_sana_sprint_is_no_evaluation(arguments, count):
    sprint = SimpleNamespace(scheduler=diffusers.SCMScheduler(), config={})
    arguments = {"timesteps": None, **arguments}
    assert find_steps(sprint, arguments, 4) == (count, count)
    assert find_exact_steps(sprint, arguments, 2) == 2
    cut = {"get_timesteps": diffusers.SanaSprintImg2ImgPipeline.get_timesteps}
    sprint = type("SanaSprintImg2Img", (), {**cut, **vars(sprint)})()
    assert count_evaluations(sprint, {**arguments, "strength": 0.5}, 2) == 1


@pytest.mark.parametrize(
    ("options", "arguments", "planned", "made"),
    [
        ({"timestep_spacing": "trailing"}, {}, 42, 40),
        ({"timestep_spacing": "trailing"}, {}, 36, 34),
        ({"timestep_spacing": "trailing"}, {}, 38, 38),
        ({"timestep_spacing": "trailing"}, {"strength": 0.5}, 21, 20),
        ({"timestep_spacing": "trailing"}, {}, 320, 320),  # the next that suits is 250
        ({"timestep_spacing": "leading"}, {}, 42, 42),
    ],
)
def test_plans_with_dot_suit_where_ddim_lands(options, arguments, planned, made):
    """A step of DDIM ends 1000 // n below; what it leaves to where the next begins adds up."""
    cut = {"get_timesteps": diffusers.StableDiffusionImg2ImgPipeline.get_timesteps}
    pipe = type("Pipeline", (), {**cut, "scheduler": diffusers.DDIMScheduler(**options)})()
    pipe.config, plan = {}, MorsePlan.uniform(4, planned - 4)
    shorter, steps = shorten_plan(pipe, arguments, plan, (20.0, 6.0))
    assert len(shorter) == made == count_evaluations(pipe, arguments, steps)
    assert shorter == (plan.shortened(made).filled(20.0, 6.0) if made < planned else plan)
    alone, _ = shorten_plan(pipe, arguments, MorsePlan.uniform(planned, 0))
    assert len(alone) == planned  # Dash does as it would without Morse
    pipe.scheduler.set_timesteps(steps)
    step = (pipe.scheduler.timesteps[0] - pipe.scheduler.timesteps[-1]) / (steps - 1)
    assert abs(step / (1000 // steps) - 1) < 0.015 or planned == 320
    dash = MorsePlan.uniform(planned, 0)
    assert shorten_plan(pipe, arguments, dash) == (dash, find_steps(pipe, arguments, planned)[0])


@pytest.mark.parametrize("find", [find_steps, find_exact_steps])
@pytest.mark.parametrize("timesteps", [None, [900, 500, 100]])
def test_a_strength_that_leaves_no_evaluation_is_named(find, timesteps):
    cut = {"get_timesteps": diffusers.StableDiffusionImg2ImgPipeline.get_timesteps}
    members = {**cut, "scheduler": diffusers.EulerDiscreteScheduler(), "config": {}}
    pipe = type("ImageToImage", (), members)()
    with pytest.raises(ValueError, match=r"no evaluation at all with strength=0\.0, .* raise"):
        find(pipe, {"strength": 0.0, "timesteps": timesteps}, 5)


def test_a_run_that_ends_early_ends_where_another_goes_on():
    """SDXL's base hands over to its refiner at 80 %, timestep 200 of 1000."""
    scheduler = diffusers.EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1)
    base = SimpleNamespace(scheduler=scheduler, config={})
    for length, steps in ((4, 6), (8, 11)):
        assert find_steps(base, {"denoising_end": 0.8}, length) == (steps, length)
        scheduler.set_timesteps(steps)
        assert 150 < scheduler.timesteps[length] < 200 <= scheduler.timesteps[length - 1]

"""Peers on transformer blocks: they change images, and leave no trace afterwards."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from test_guided_benchmark import tiny_dit
from tiny_pipelines import stable_diffusion, text_inputs, text_unet, tiny_vae

from morse.evaluation.bench import ays, caches, peers
from morse.evaluation.bench.loading import with_scheduler
from morse.evaluation.bench.methods import Method
from morse.evaluation.bench.peers import PEERS, measure_peer, peer_facts, peer_steps
from morse.evaluation.bench.runs import Samples, sample_images
from morse.evaluation.bench.tasks import PEER_SETTINGS
from morse.evaluation.conditions import Conditions

STEPS = 8


def stir(model, scale=0.05):
    """Weights that start at zero would make a block do nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def sd3():
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=8,
        pooled_projection_dim=8,
        out_channels=4,
        pos_embed_max_size=8,
    )
    names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    names += ("tokenizer", "tokenizer_2", "tokenizer_3")
    scheduler = FlowMatchEulerDiscreteScheduler()
    absent = dict.fromkeys(names)
    return StableDiffusion3Pipeline(stir(transformer), scheduler, tiny_vae(), **absent)


def flux():
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    )
    names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    scheduler, absent = FlowMatchEulerDiscreteScheduler(), dict.fromkeys(names)
    return FluxPipeline(scheduler, tiny_vae(), transformer=stir(transformer), **absent)


def unet():
    torch.manual_seed(0)
    return stable_diffusion(StableDiffusionPipeline, stir(wide_unet(8, attention_on_top=True)))


EMBEDS = text_inputs(2, pooled=True)
WANTED = {
    "dit": Conditions(class_labels=(1, 2), guidance_scale=3.0),
    "unet": Conditions(
        embeds={k: EMBEDS[k] for k in ("prompt_embeds", "negative_prompt_embeds")},
        guidance_scale=3.0,
    ),
    "sd3": Conditions(embeds=EMBEDS | {}, guidance_scale=3.0),
    "flux": Conditions(embeds={k: EMBEDS[k] for k in ("prompt_embeds", "pooled_prompt_embeds")}),
}
BUILD = {"dit": tiny_dit, "unet": unet, "sd3": sd3, "flux": flux}


@pytest.fixture(scope="module")
def pipes():
    made = {name: build() for name, build in BUILD.items()}
    for pipe in made.values():
        pipe.set_progress_bar_config(disable=True)
        for part in ("vae", "image_processor"):
            assert hasattr(pipe, part) or name_of(pipe) == "DiTPipeline"
    return made


def name_of(pipe):
    return type(pipe).__name__


def latents(pipe, name, steps=STEPS, seeds=(0, 1)):
    """Latents where the pipeline gives them, else pictures."""
    arguments = WANTED[name].arguments(range(len(seeds)))
    size = {} if name == "dit" else {"height": 32, "width": 32}
    if name in ("sd3", "flux"):
        size = {"height": 16, "width": 16}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    kind = "pt" if name == "dit" else "latent"
    return pipe(
        generator=generators, num_inference_steps=steps, output_type=kind, **size, **arguments
    ).images


def denoiser(pipe):
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def traces(pipe):
    return {name: set(vars(module)) for name, module in denoiser(pipe).named_modules()}


# peer -> the pipelines that it works with here; the others raise, or are said not to fit
ENGAGES = {
    "tomesd": ("unet",),
    "fbcache": ("dit", "flux"),
    "pab": ("dit", "sd3", "flux"),
    "fastercache": ("flux",),
    "taylorseer": ("dit", "sd3", "flux"),
    "cache-dit": ("dit", "flux"),
}
PAIRS = [(peer, name) for peer, names in ENGAGES.items() for name in names]
NUMBERS = {"tomesd": 0.5, "fbcache": 5.0, "cache-dit": 5.0}  # thresholds that skip always


@pytest.mark.parametrize(("peer", "name"), PAIRS, ids=[f"{a}-{b}" for a, b in PAIRS])
def test_a_peer_engages_and_leaves_no_trace(pipes, peer, name):
    pytest.importorskip({"cache-dit": "cache_dit", "tomesd": "tomesd"}.get(peer, "torch"))
    pipe = pipes[name]
    assert PEERS[peer].obstacle(pipe) is None
    bare = latents(pipe, name)
    before = traces(pipe)
    with PEERS[peer].apply(pipe, NUMBERS.get(peer, 2.0)):
        sped = latents(pipe, name)
        assert not torch.equal(sped, bare) and sped.isfinite().all()
        again = latents(pipe, name)
        if peer != "tomesd":  # which draws at random which tokens it merges
            assert torch.equal(again, sped), "state of the run before is left"
    assert torch.equal(latents(pipe, name), bare)
    assert traces(pipe) == before
    with pytest.raises(RuntimeError, match="stop"), PEERS[peer].apply(pipe, 2.0):
        raise RuntimeError("stop")
    assert torch.equal(latents(pipe, name), bare)


def test_tomesd_merges_where_attention_begins(pipes):
    """Its own limit is full resolution, below which the attention of SDXL, and of this, begins."""
    pytest.importorskip("tomesd")
    pipe = stable_diffusion(StableDiffusionPipeline, stir(text_unet()))
    bare = latents(pipe, "unet")
    with PEERS["tomesd"].apply(pipe, 0.5):
        assert not torch.equal(latents(pipe, "unet"), bare)
    nothing = Method("ddim", "tomesd", setting="ratio 0.0")
    measured = measure_peer(pipe, nothing, 2, WANTED["unet"])
    assert not measured["engaged"] and "bit for bit" in measured["note"]


@pytest.mark.parametrize("peer", ["fbcache", "fastercache", "cache-dit"])
def test_what_raises_with_stable_diffusion_3_is_cleaned_up(pipes, peer):
    """diffusers 0.42: its last block returns no text, and more than it knows is batched."""
    pipe, before = pipes["sd3"], traces(pipes["sd3"])
    bare = latents(pipe, "sd3")
    with pytest.raises((RuntimeError, TypeError, ValueError)), PEERS[peer].apply(pipe, 2.0):
        latents(pipe, "sd3")
    assert torch.equal(latents(pipe, "sd3"), bare) and traces(pipe) == before


def test_obstacles_are_told(pipes, monkeypatch):
    for peer in ("fbcache", "pab", "fastercache", "taylorseer"):
        assert "is none" in PEERS[peer].obstacle(pipes["unet"])
    assert "none that it knows" in PEERS["tomesd"].obstacle(pipes["dit"])
    assert "has it first" in PEERS["fastercache"].obstacle(pipes["dit"])
    monkeypatch.setattr(caches, "find_spec", lambda name: None)
    for peer in ("tomesd", "cache-dit"):
        assert f"pip install {peer}" in PEERS[peer].obstacle(pipes["dit"])


def test_every_peer_has_settings():
    assert set(PEERS) == set(PEER_SETTINGS)
    for peer, settings in PEER_SETTINGS.items():
        for setting in settings:
            assert peers.number_of(Method("ddim", peer, setting=setting)) > 0


def test_a_peer_that_raises_is_told_and_gives_no_figures(pipes, monkeypatch):
    def broken(pipe, number):
        raise IndexError("pop from empty list")

    monkeypatch.setitem(PEERS, "pab", peers.Peer(broken, lambda pipe: None))
    method = Method("ddim", "pab", setting="every 2")
    measured = measure_peer(pipes["dit"], method, 2, WANTED["dit"])
    assert measured == {"error": "it raised IndexError: pop from empty list"}


def test_a_peer_that_does_nothing_is_told(pipes):
    """No threshold of zero is ever fallen below, so First Block Cache skips nothing."""
    method = Method("ddim", "fbcache", setting="threshold 0")
    measured = measure_peer(pipes["dit"], method, 2, WANTED["dit"])
    assert not measured["engaged"] and "bit for bit" in measured["note"]
    images = sample_images(pipes["dit"], 4, range(2), 2, conditions=WANTED["dit"])
    changes, note = peer_facts(method, measured, images, [0.1] * 4, lambda: images.images)
    assert changes["engaged"] is False and note.startswith("4 steps of ")
    # In so many steps it does: what it did in the trial's is forgotten.
    changes, note = peer_facts(method, measured, images, [0.0] * 4, None)
    assert changes["engaged"] is True and note == "4 steps of 0.00 LSD"


def test_costs_are_in_evaluations_of_the_bare_pipeline():
    tomesd = Method("ddim", "tomesd", setting="ratio 0.5")
    measured = {"step_lsd": 0.8, "bare_seconds": 2.0, "engaged": True, "note": ""}
    assert peer_steps(tomesd, 8, measured) == 10 and peer_steps(tomesd, 0.5, measured) == 1
    images = Samples(torch.zeros(4, 1, 2, 2), 10, 0, 9.0, "", {}, (4.0, 4.0), 2)
    changes, note = peer_facts(tomesd, measured, images, [], None)
    assert changes == {"lsd": 8.0, "engaged": True} and note == "10 steps of 0.80 LSD"
    # An adaptive one is timed: 20 calls of 1 s where a bare one takes 2 s.
    cache = Method("ddim", "fbcache", setting="threshold 0.1")
    changes, note = peer_facts(cache, measured, images, [1.0] * 20, None)
    assert changes == {"lsd": 5.0, "engaged": True} and note == "10 steps of 0.50 LSD"
    changes, note = peer_facts(cache, measured, images, [2.0] * 20, None)
    assert changes["engaged"] is False and "took 100%" in note
    # A gain of 15 % is believed where the first batch's pictures are others than the bare ones.
    for bare, engaged in ((torch.ones(2, 1, 2, 2), True), (torch.zeros(2, 1, 2, 2), False)):
        changes, note = peer_facts(cache, measured, images, [1.7] * 20, lambda bare=bare: bare)
        assert changes["engaged"] is engaged and ("bit for bit" in note) is not engaged


def test_cache_dits_default_is_its_own(monkeypatch):
    package = pytest.importorskip("cache_dit")
    seen = []
    monkeypatch.setattr(
        package, "enable_cache", lambda model, cache_config: seen.append(cache_config)
    )
    monkeypatch.setattr(package, "disable_cache", lambda model: None)
    pipe = tiny_dit()
    for setting in PEER_SETTINGS["cache-dit"][:2]:
        with peers.apply_peer(pipe, Method("ddim", "cache-dit", setting=setting)):
            pass
    assert seen[0] == package.DBCacheConfig()
    assert (seen[1].Fn_compute_blocks, seen[1].residual_diff_threshold) == (1, 0.05)


def test_tuned_timesteps_are_the_authors_own_and_between():
    wide = stable_diffusion(StableDiffusionPipeline, wide_unet())
    assert ays.ays_name(wide) == "StableDiffusion" and ays.ays_name(unet()) is None
    scheduler = DPMSolverMultistepScheduler.from_config(wide.scheduler.config)
    tuned = ays.AysScheduler.of(scheduler, "StableDiffusion")
    tuned.set_timesteps(10)
    assert tuned.timesteps.tolist() == ays.AysSchedules["StableDiffusionTimesteps"]
    for other in ("karras_sigmas", "exponential_sigmas", "beta_sigmas", "lu_lambdas"):
        options = {"algorithm_type": "dpmsolver++", f"use_{other}": True}
        own = DPMSolverMultistepScheduler.from_config(wide.scheduler.config, **options)
        again = ays.AysScheduler.of(own, "StableDiffusion")
        again.set_timesteps(10)
        assert torch.equal(again.sigmas, tuned.sigmas)
    alphas = scheduler.alphas_cumprod
    for steps in (1, 2, 5, 7, 20, 50, 300, 1000):
        found = ays.ays_timesteps("StableDiffusion", steps, alphas)
        assert len(found) == steps and found[0] == 999 and sorted(set(found))[::-1] == found
    # Twenty steps hold the ten, and between two of them the geometric mean of their noise.
    found = ays.ays_timesteps("StableDiffusion", 20, alphas)
    assert found[::2] == ays.AysSchedules["StableDiffusionTimesteps"]
    sigmas = ((1 - alphas) / alphas).sqrt()
    mean = (sigmas[found[6]] * sigmas[found[8]]).sqrt()
    assert sigmas[found[7] - 1] < mean < sigmas[found[7] + 1]


@pytest.mark.parametrize("name", ["StableDiffusion", "StableDiffusionXL"])
@pytest.mark.parametrize("steps", [5, 10, 20, 30])
def test_the_noise_levels_are_the_authors(name, steps):
    """Eleven, the last of them .029, to one more than steps; the last of those is not evaluated."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = (1 - betas).cumprod(0)
    sigmas = ((1 - alphas) / alphas).sqrt()
    levels = np.log([*ays.AysSchedules[f"{name}Sigmas"][:-1], 0.0291671582])
    wanted = np.interp(np.linspace(0, 10, steps + 1)[:-1], np.arange(11), levels)
    found = ays.ays_timesteps(name, steps, alphas)
    # Timesteps are whole: at the clean end the next one has a fifth more noise.
    np.testing.assert_allclose(sigmas[found].log(), wanted, atol=0.02 if steps < 20 else 0.11)
    last = {5: 0.399, 10: 0.152, 20: 0.066, 30: 0.050}
    if name == "StableDiffusion":
        assert sigmas[found[-1]] == pytest.approx(last[steps], abs=2e-3)


def wide_unet(width=768, attention_on_top=False):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    down, up = ["DownBlock2D", "CrossAttnDownBlock2D"], ["CrossAttnUpBlock2D", "UpBlock2D"]
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=down[::-1] if attention_on_top else down,
        up_block_types=up[::-1] if attention_on_top else up,
        cross_attention_dim=width,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


def test_tuned_timesteps_are_sampled_at():
    pipe = stable_diffusion(StableDiffusionPipeline, wide_unet())
    scheduler = DPMSolverMultistepScheduler.from_config(DDIMScheduler().config)
    tuned = with_scheduler(pipe, ays.AysScheduler.of(scheduler, "StableDiffusion"))
    seen = []
    handle = pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(int(args[1])))
    embeds = {"prompt_embeds": torch.ones(1, 3, 768)}
    wanted = Conditions(embeds=embeds, guidance_scale=1.0)
    sample_images(tuned, 10, range(1), 1, conditions=wanted)
    handle.remove()
    assert seen == ays.AysSchedules["StableDiffusionTimesteps"]

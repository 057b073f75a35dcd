"""What can be chosen at UnifyEdit's sampler and inversion: each option does what it says and nothing else."""

from __future__ import annotations

import itertools
from typing import Any

import comfy.samplers
import pytest
import small_models
import torch
from host import Host
from unify_edit import Edit, box_mask, denoise, euler, projections, tokenizer_only_clip

SCALE = 0.18215


@pytest.fixture(scope="module")
def model() -> Any:
    """A random UNet with inference-tensor weights."""
    return small_models.small_unet()


def one_step(host: Host, model: Any) -> Edit:
    """An edit in one Euler step at guidance 1: what comes out is the prediction itself."""
    edit = Edit(host, model, steps=1)
    edit.cfg = 1.0
    return edit


def test_noise_and_latent(host: Host, model: Any) -> None:
    """Protects: update_target noise predicts at the latent that was there and takes the update off the next
    one; update_target latent takes it off first and predicts there.
    """
    edit = one_step(host, model)
    plain = edit.run(euler(host)) * SCALE
    edit.sampler_inputs["update_target"] = "noise"
    move = plain - edit.run() * SCALE
    assert float(move.norm()) > 0
    edit.sampler_inputs["update_target"] = "latent"
    start = edit.inversion.trajectory[0]
    expected = denoise(model, start - move, edit.sigmas[0], edit.positive)
    torch.testing.assert_close(edit.run() * SCALE, expected, rtol=1e-3, atol=2e-4)


def test_inner_steps(host: Host, model: Any) -> None:
    """Protects: every inner step starts where the last one ended, so the loss falls within a step."""
    edit = Edit(host, model, steps=2)
    edit.sampler_inputs.update(balance=edit.balance(beta1=0.0, beta2=0.05), inner_steps=3)
    edit.run()
    trace = edit.trace()
    assert trace.at == pytest.approx((0, 1 / 3, 2 / 3, 1, 4 / 3, 5 / 3))
    for step in (0, 3):
        losses = trace.values[step : step + 3, 1, 0]
        assert bool((losses[1:] < losses[:-1]).all())


def test_range_of_steps(host: Host, model: Any) -> None:
    """Protects: only steps between start and end are optimised; the others are stock Euler steps."""
    edit = Edit(host, model, steps=4)
    sampling = model.get_model_object("model_sampling")
    percents = [1 - float(sampling.timestep(sigma)) / 999 for sigma in edit.sigmas[:-1]]
    edit.sampler_inputs.update(start_percent=percents[1] - 0.01, end_percent=percents[2] + 0.01)
    edit.run()
    assert edit.trace().at == (1, 2)
    edit.sampler_inputs.update(start_percent=percents[0] + 0.01, end_percent=percents[1] - 0.01)
    with pytest.raises(Exception, match=r"UnifyEdit Sampler: no step is optimised: start_percent 0\."):
        edit.run()


def test_nothing_is_paid_outside_the_range(host: Host, model: Any) -> None:
    """Protects: steps outside start and end run the network on as many rows as a stock run does."""
    edit = Edit(host, model, steps=4)
    rows: list[int] = []
    unet = model.model.diffusion_model
    handle = unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    try:
        counts = []
        for end in (None, 0.5, 1.0):
            rows.clear()
            edit.sampler_inputs["end_percent"] = end
            edit.run(euler(host) if end is None else None)
            counts.append(sum(rows))
    finally:
        handle.remove()
    stock, half, whole = counts
    assert stock == 4 * 2
    assert half - stock == (whole - stock) / 2 > 0


def test_curve_that_ends_early(host: Host, model: Any) -> None:
    """Protects: a loss whose curve has come to 0 is no longer computed, nor the source branch for it."""
    edit = Edit(host, model, steps=4)
    curves = {"structure_curve": [(0.0, 0.0), (0.5, 0.0), (1.0, 1.0)]}
    curves["words_curve"] = [(0.0, 1.0), (0.5, 0.0), (1.0, 0.0)]
    edit.sampler_inputs["balance"] = edit.balance(**curves)
    edit.run()
    computed = torch.isfinite(edit.trace().values[:, :2, 0])
    assert computed.tolist() == [[False, True], [False, True], [True, False], [True, False]]


@pytest.mark.parametrize("option", ["structure_region", "alignment"])
def test_regions_and_forms(host: Host, model: Any, option: str) -> None:
    """Protects: each choice reaches its loss: as many edits as choices."""
    choices = {
        "structure_region": ("everywhere", "inside", "outside"),
        "alignment": ("token_ratio", "absolute", "spatial_ratio", "area_ratio"),
    }
    edit = Edit(host, model, steps=1)
    edit.sampler_inputs["mask"] = box_mask()
    found = []
    for choice in choices[option]:
        edit.sampler_inputs[option] = choice
        found.append(edit.run())
        assert bool(torch.isfinite(found[-1]).all())
    for one, two in itertools.combinations(found, 2):
        assert float((one - two).abs().max()) > 1e-3


def test_named_layers(host: Host, model: Any) -> None:
    """Protects: names and beginnings of names choose the same layers as their resolution does."""
    named = host.pack_module("patches.attention.layers").named_layers
    layers = host.network(model).layers.values()
    assert named("word_layers", layers, "output") == tuple(s for s in layers if s.key.startswith("output"))
    assert named("word_layers", layers, " Middle.0.0, input.1") == tuple(
        layer for layer in layers if layer.key in ("input.1.0", "middle.0.0")
    )
    edit = Edit(host, model, steps=1)
    by_side = edit.run()
    fine = ", ".join(layer.key for layer in layers if layer.level == 0)
    edit.sampler_inputs.update(structure_layers="input, middle, output", word_layers=fine, cross_attn_res=4)
    assert torch.equal(edit.run(), by_side)
    for name in ("structure_layers", "word_layers"):
        edit.sampler_inputs.update({"structure_layers": "", "word_layers": "", name: "output.99"})
        with pytest.raises(Exception, match=f"UnifyEdit Sampler: {name} has 'output.99', but .* input.1.0"):
            edit.run()


def test_side_below_the_coarsest_grid(host: Host, model: Any) -> None:
    """Protects: a resolution below every grid of the model takes the coarsest, 4x4 here, without an error."""
    edit = Edit(host, model, steps=1)
    found = []
    for side in (1, 3, 4, 8):
        edit.sampler_inputs["max_self_attn_res"] = side
        found.append(edit.run())
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[2])
    assert not torch.equal(found[3], found[2])


def test_checkpointing(host: Host, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: with checkpointing the edit is the same, and layers are computed again in the backward
    passes.
    """
    # As on a CPU, also where a card would run source and target together.
    monkeypatch.setattr(host.pack_module("patches.unify.memory"), "few_operations", lambda *_: False)
    edit = Edit(host, model, steps=2)
    ran: list[int] = []
    layer = model.model.diffusion_model.middle_block[0]
    handle = layer.register_forward_pre_hook(lambda *_: ran.append(1))
    try:
        plain, count = edit.run(), len(ran)
        edit.sampler_inputs["checkpointing"] = True
        torch.testing.assert_close(edit.run(), plain, rtol=1e-3, atol=1e-3)
    finally:
        handle.remove()
    # Three calls a step: source, target, prediction; and twice again the target, for each loss's gradient.
    assert (count, len(ran) - count) == (6, 10)


@pytest.mark.parametrize("scheduler", comfy.samplers.SCHEDULER_NAMES)
def test_virtual_inversion_is_exact(host: Host, model: Any, scheduler: str) -> None:
    """Protects: from a virtual inversion the same description gives the image back, whatever the SIGMAS."""
    edit = Edit(host, model, batch=2, mode="virtual")
    sampling = model.get_model_object("model_sampling")
    edit.sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, 4)
    edit.inversion, edit.noise, _ = host.execute(
        "DescEditInvert",
        model=model,
        latent=edit.latent,
        source=small_models.conditioning(1),
        sigmas=edit.sigmas,
        mode="virtual",
    )
    edit.positive, edit.cfg = small_models.conditioning(1), 1.0
    edit.sampler_inputs["balance"] = edit.balance(beta1=0.0, beta2=0.0)
    torch.testing.assert_close(edit.run(), edit.latent["samples"], rtol=1e-4, atol=1e-3)


def test_virtual_inversion_follows_the_formula(host: Host, model: Any) -> None:
    """Protects: the path is x_0 + sigma n with one n for all images, and a step takes the source's error off
    the target's prediction: InfEdit's x_0 + (x*_t - x^s_t) - sigma (eps* - eps_s).
    """
    edit = Edit(host, model, batch=2, steps=2, mode="virtual", virtual_seed=7)
    clean = edit.latent["samples"].double() * SCALE
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(7)).double()
    path = torch.stack([clean + sigma * noise for sigma in edit.sigmas.double()])
    torch.testing.assert_close(edit.inversion.trajectory.double(), path, rtol=1e-5, atol=1e-5)
    edit.cfg = 1.0
    edit.sampler_inputs["balance"] = edit.balance(beta1=0.0, beta2=0.0)
    x = path[0]
    for step in range(2):
        sigma, below = edit.sigmas[step : step + 2].double()
        noises = []
        for at, condition in ((x, edit.positive), (path[step], small_models.conditioning(1))):
            denoised = denoise(model, at.float(), edit.sigmas[step], condition).double()
            noises.append((at - denoised) / sigma)
        x0 = clean + (x - path[step]) - sigma * (noises[0] - noises[1])
        x = x0 + below * (noises[0] - noises[1] + noise)
    torch.testing.assert_close((edit.run() * SCALE).double(), x, rtol=1e-3, atol=1e-3)


def test_virtual_inversion_edits(host: Host, model: Any) -> None:
    """Protects: the losses act on a virtual inversion too, with a noise mask that keeps the rest, and another
    seed is another edit.
    """
    results = []
    for seed in (0, 1):
        edit = Edit(host, model, mode="virtual", virtual_seed=seed)
        edit.noise = {**edit.noise, "noise_mask": box_mask()}
        results.append(edit.run())
        assert bool(torch.isfinite(results[-1]).all())
        assert bool(torch.isfinite(edit.trace().values).all())
        source = edit.latent["samples"]
        torch.testing.assert_close(results[-1][..., 7:], source[..., 7:], rtol=1e-4, atol=1e-3)
        assert torch.equal(edit.run(), results[-1])
    first, second = results
    assert not torch.allclose(first, second, atol=1e-2)


def test_automatic_mask(host: Host) -> None:
    """Protects: the mask is where the edit's words or the words they replace look, image by image, on the
    latent's grid.
    """
    mask = host.pack_module("patches.unify.mask")
    words = host.pack_module("patches.unify.words").Words
    kind = host.pack_module("patches.attention.layers").AttentionLayer
    layer = kind("output.0.0", level=0, width=8, heads=3, path="")
    tokens = torch.zeros(1, 1, 6)
    tokens[..., 2] = 1
    description = torch.zeros(1, 6)
    description[:, 1:4] = 1
    found = []
    for left in (1, 4):
        maps = torch.full((2, 3, 8, 8, 6), 0.1)
        maps[0, :, 2:4, left : left + 2, 2] = 0.9
        maps[1, :, 6, 6, 2] = 0.9
        readings = {layer.key: projections(host, maps.flatten(2, 3))}
        made = words(tokens, description, torch.ones(1, 1))
        found.append(mask.word_attention(readings, made, [layer], 8, 8))
        torch.testing.assert_close(found[-1][0, 2, left], torch.tensor(0.9 / 1.4))
        torch.testing.assert_close(found[-1][0, 0, 0], torch.tensor(1 / 6))
    expected = torch.zeros(2, 8, 8)
    expected[0, 2:4, 1:3] = expected[0, 2:4, 4:6] = 1
    expected[1, 6, 6] = 1
    assert torch.equal(mask.attention_mask(found), expected)


def test_layers_where_words_are(host: Host, model: Any) -> None:
    """Protects: by default words are read at the layers measured for the kind of model, and at those nearest
    to 16x16 of a kind that was not measured; a resolution or names come first.
    """
    choose = host.pack_module("patches.attention.layers").word_layers
    layers = host.network(model).layers.values()

    def chosen(res: int, names: str = "", kind: str = "TinySD15") -> set[str]:
        return {layer.key for layer in choose(layers, 16, 16, res, names, kind)}

    usual = chosen(16)
    assert chosen(0) == {"output.3.0", "output.4.0"} != usual
    assert chosen(0, kind="SD15") == chosen(0, kind="") == usual
    assert chosen(0, names="middle") == {"middle.0.0"}
    assert chosen(4) == chosen(4, kind="SD15")
    network = host.pack_module("models.tiny_studio.studio")
    assert network.TinySD15.__name__ in host.pack_module("patches.attention.layers").MEASURED


def test_automatic_mask_in_a_run(host: Host, model: Any) -> None:
    """Protects: auto_mask edits as its mask would if it were wired, and a wired mask comes first."""
    edit = Edit(host, model, batch=2)
    edit.sampler_inputs.update(auto_mask=True, alignment="spatial_ratio")
    automatic = edit.run()
    mask = edit.trace().mask
    assert mask.shape == (2, 16, 16)
    edit.sampler_inputs["mask"] = mask.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)
    torch.testing.assert_close(edit.run(), automatic, rtol=1e-4, atol=1e-4)
    assert torch.equal(edit.trace().mask, edit.sampler_inputs["mask"])


def test_rows_of_their_own(host: Host, model: Any) -> None:
    """Protects: in a batch every image has its own words, texts and mask, and comes out as alone."""
    sampler = host.pack_module("patches.unify.sampler")
    texts = ("a green circle on sand", "a red star")
    tokens = [
        host.execute(
            "DescEditFindTokens",
            clip=tokenizer_only_clip(),
            source_description="a red circle",
            edit_description=text,
        )[0]
        for text in texts
    ]
    assert len({len(found.words) for found in tokens}) == 2
    masks = torch.cat([box_mask(), 1 - box_mask()])

    def batched(seeds: tuple[int, ...]) -> Any:
        made = [small_models.conditioning(seed)[0] for seed in seeds]
        return [[torch.cat([text for text, _ in made]), {"pooled_output": made[0][1]["pooled_output"]}]]

    def edit(rows: tuple[int, ...]) -> torch.Tensor:
        made = Edit(host, model, steps=2)
        made.latent = {"samples": torch.cat([small_models.latent(3 + row) for row in rows])}
        made.inversion, made.noise, _ = host.execute(
            "DescEditInvert",
            model=model,
            latent=made.latent,
            source=batched(tuple(10 + row for row in rows)),
            sigmas=made.sigmas,
            refine=1,
        )
        made.positive = batched(tuple(20 + row for row in rows))
        settings = sampler.UnifySettings(
            inversion=made.inversion,
            edit_tokens=tuple(tokens[row] for row in rows),
            mask=masks[list(rows)],
        )
        return made.run(sampler.UnifySampler(settings)) * SCALE

    for together, alone in zip(edit((0, 1)), (edit((0,)), edit((1,))), strict=True):
        assert float((together - alone).norm() / alone.norm()) < 1e-4
    made = Edit(host, model)
    settings = sampler.UnifySettings(inversion=made.inversion, edit_tokens=tuple(tokens))
    with pytest.raises(Exception, match="edit_tokens are for 2 images but 1 are edited"):
        made.run(sampler.UnifySampler(settings))

"""UnifyEdit's sampler in the host: the executor's inference mode, masks, batches, errors."""

from __future__ import annotations

import logging
import math
from typing import Any

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import latent_preview
import pytest
import small_models
import torch
from host import Host, device
from unify_edit import SIZE, STEPS, Edit, FakeControl, box_mask, euler


@pytest.fixture(scope="module")
def model() -> Any:
    """A random UNet with inference-tensor weights."""
    return small_models.small_unet()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
def test_edits_and_leaves_the_model_alone(host: Host, dtype: torch.dtype, masked: bool) -> None:
    """Protects: under inference mode, with inference-tensor weights in full and half precision, it edits
    and leaves no trace.
    """
    model = small_models.small_unet(dtype=dtype)
    edit = Edit(host, model)
    if masked:
        edit.sampler_inputs["mask"] = box_mask()
    before = small_models.fingerprint(model)
    edited = edit.run()
    assert small_models.fingerprint(model) == before
    assert bool(torch.isfinite(edited).all())
    plain = edit.run(euler(host))
    assert float((edited - plain).norm() / plain.norm()) > 0.01
    assert torch.equal(edit.run(), edited)


def test_zero_strength_is_plaineuler(host: Host, model: Any) -> None:
    """Protects: with both betas at 0 the result is that of the stock Euler sampler from inverted noise."""
    edit = Edit(host, model)
    edit.sampler_inputs["balance"] = edit.balance(beta1=0.0, beta2=0.0)
    torch.testing.assert_close(edit.run(), edit.run(euler(host)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("beta1", "beta2"), [(1.0, 0.0), (0.0, 1.0)])
def test_each_loss_falls(host: Host, model: Any, beta1: float, beta2: float) -> None:
    """Protects: each loss alone, followed by its own gradient, ends lower than without it."""
    edit = Edit(host, model)
    edit.sampler_inputs["balance"] = edit.balance(combination="norm", beta1=beta1, beta2=beta2)
    losses = {}
    for name, latent in (("with", edit.run()), ("without", edit.run(euler(host)))):
        losses[name] = measure(host, edit, latent)
    better = [with_it < without for with_it, without in zip(losses["with"], losses["without"], strict=True)]
    assert better[0 if beta1 else 1]


def measure(host: Host, edit: Edit, latent: torch.Tensor) -> tuple[float, float]:
    """Both losses of a finished latent at the smallest noise level, measured with a plain model call."""
    maps, losses = host.pack_module("patches.attention.recorder"), host.pack_module("patches.unify.losses")
    network = host.network(edit.model)
    layers = network.layers.values()
    words = [layer for layer in layers if layer.level == 0]
    found = {}
    for name, samples, condition in (
        ("source", edit.latent["samples"], small_models.conditioning(1)),
        ("target", latent, edit.positive),
    ):
        recorder = maps.AttentionRecorder(network, layers, words, stop=True)
        entries = {"positive": comfy.sampler_helpers.convert_cond(condition)}
        x = (samples * 0.18215).to(device())
        conds = comfy.samplers.process_conds(edit.model.model, x, entries, x.device)
        options = recorder.attach({"transformer_options": {}})
        edit.model.pre_run()
        with torch.inference_mode():
            comfy.samplers.calc_cond_batch(
                edit.model.model, [conds["positive"]], x, edit.sigmas[-2][None].to(x), options
            )
        found[name] = recorder
    masks = host.pack_module("patches.attention.masks").layer_masks(None, words, 16, 16, device())
    edit_words = host.pack_module("patches.unify.words").edit_words
    positions = edit_words([edit.tokens], small_models.TEXT_TOKENS).to(device())
    structure = losses.structure_loss(found["source"].self_attention, found["target"].self_attention)
    alignment = losses.alignment_loss(found["target"].cross_attention, positions, masks)
    return float(structure.values), float(alignment.values)


@pytest.mark.parametrize("masked", [False, True], ids=["whole image", "noise mask"])
def test_update_follows_the_formula(
    host: Host, model: Any, monkeypatch: pytest.MonkeyPatch, masked: bool
) -> None:
    """Protects: the latent moves along both gradients, structure's in units of the source's own step, words'
    in units of what the last prediction's text guidance moves (before it, a fifth of that step), neither
    further than its loss needs, inside a noise mask.
    """
    edit = Edit(host, model, batch=2)
    edit.sampler_inputs["balance"] = edit.balance(beta1=0.3, k1=2.0, beta2=0.7, k2=1.0)
    reach = torch.ones(16)
    if masked:
        mask = torch.ones(2, SIZE, SIZE)
        mask[..., SIZE // 2 :] = reach[8:] = 0
        edit.noise = {**edit.noise, "noise_mask": mask}
    target = host.pack_module("patches.unify.target").Target
    gradients, before, after, found, terms = target.gradients, [], [], [], []

    def note(args: dict[str, Any]) -> torch.Tensor:
        terms.append((args["cond_denoised"] - args["uncond_denoised"]).cpu().double() * args["cond_scale"])
        return args["denoised"]

    edit.model = model.clone()
    edit.model.set_model_sampler_post_cfg_function(note)

    def spied(self: Any, x: torch.Tensor, *rest: Any) -> Any:
        before.append(x.cpu().double())
        found.append(gradients(self, x, *rest))
        return found[-1]

    def prepare(model: Any, steps: int, x0: dict | None = None) -> Any:
        return lambda step, denoised, x, total: after.append(x.cpu().double())

    monkeypatch.setattr(target, "gradients", spied)
    monkeypatch.setattr(latent_preview, "prepare_callback", prepare)
    edit.run()
    sampling, path = model.get_model_object("model_sampling"), edit.inversion.trajectory.double()
    assert len(found) == STEPS
    for step in range(STEPS):
        progress = 1 - float(sampling.timestep(edit.sigmas[step])) / 999
        structure, alignment = found[step].structure.cpu().double(), found[step].alignment.cpu().double()
        values, sigmas = found[step].values.cpu().double(), edit.sigmas.double()
        for row in range(2):
            own = (path[step, row] - path[step + 1, row]).norm()
            text = 0.2 * own
            if step:
                text = terms[step - 1][row].norm() * (1 - sigmas[step + 1] / sigmas[step])
            expected = torch.zeros(4, 16, 16).double()
            for loss, gradient, length in (
                (values[0, row], structure[row], 0.3 * math.exp(-2 * (1 - progress)) * own),
                (values[1, row], alignment[row], 0.7 * math.exp(-progress) * text),
            ):
                norm = gradient.norm()
                expected += gradient / norm * min(float(length), float(loss / norm)) * reach
            moved = before[step][row] - after[step][row]
            torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("cfg", [1.0, 1.0 + 1e-12, 4.0])
def test_length_of_text_guidance(host: Host, model: Any, cfg: float) -> None:
    """Protects: the length of text guidance is that of the CFG term alone, whatever a later node makes of the
    prediction; a fifth of the source's step where there is none, before the first prediction and at CFG 1.
    """
    measure = host.pack_module("patches.unify.text_guidance").TextGuidance()
    step, sigma, below = torch.full((1, 1, 1, 1), 3.0), torch.tensor(4.0), torch.tensor(1.0)
    assert measure.length(sigma, below, step).item() == pytest.approx(0.6)
    others = {"sampler_post_cfg_function": [lambda args: 7 * args["denoised"]]}
    options = measure.attach(others)
    assert len(others["sampler_post_cfg_function"]) == 1
    edit_, negative = torch.full((1, 4, 2, 2), 2.0), torch.full((1, 4, 2, 2), 0.5)
    plain = math.isclose(cfg, 1.0)
    comfy.samplers.cfg_function(
        None,
        edit_,
        torch.zeros_like(negative) if plain else negative,
        cfg,
        edit_,
        sigma,
        model_options=options,
        uncond=None if plain else [],
    )
    expected = 0.6 if plain else cfg * 1.5 * 4 * 0.75
    assert measure.length(sigma, below, step).item() == pytest.approx(expected)


def test_batch_is_two_singles(host: Host, model: Any) -> None:
    """Protects: images edited together come out as edited alone, each with its own mask and gradient norm."""
    singles = [Edit(host, model, seed=3), Edit(host, model, seed=4)]
    masks = torch.cat([box_mask(), 1 - box_mask()])
    alone = []
    for row, edit in enumerate(singles):
        edit.sampler_inputs["mask"] = masks[row : row + 1]
        alone.append(edit.run())
    both = Edit(host, model, batch=2)
    both.latent = {"samples": torch.cat([edit.latent["samples"] for edit in singles])}
    both.inversion, both.noise, _ = host.execute(
        "DescEditInvert",
        model=model,
        latent=both.latent,
        source=small_models.conditioning(1),
        sigmas=both.sigmas,
        refine=1,
    )
    both.sampler_inputs["mask"] = masks
    torch.testing.assert_close(both.run(), torch.cat(alone), rtol=1e-3, atol=1e-3)


def test_noise_mask_keeps_the_source(host: Host, model: Any) -> None:
    """Protects: outside a noise mask the inverted image stays, whatever noise is wired, and inside it is
    edited.
    """
    edit = Edit(host, model)
    kept = box_mask() == 0
    edit.noise = {**edit.noise, "noise_mask": box_mask()}
    first = edit.run()
    outside = kept[:, None, ::8, ::8].expand_as(first)
    source = edit.latent["samples"]
    edge = 2  # the mask's border falls into a latent cell
    torch.testing.assert_close(first[..., 5 + edge :], source[..., 5 + edge :], rtol=1e-4, atol=1e-4)
    assert float((first - source)[~outside].abs().mean()) > 0.1
    (random,) = host.execute("RandomNoise", noise_seed=5)
    assert torch.equal(edit.run(noise=random), first)


def test_one_inversion_for_several_images(host: Host, model: Any) -> None:
    """Protects: one inverted image can be edited several times at once."""
    edit = Edit(host, model)
    edit.noise = {"samples": edit.noise["samples"].repeat(2, 1, 1, 1)}
    edited = edit.run()
    assert edited.shape[0] == 2
    torch.testing.assert_close(edited[0], edited[1], rtol=1e-4, atol=1e-4)


def test_preview_and_progress(host: Host, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: every step reports itself, with its denoised latent, to the host's preview."""
    reported = []

    def prepare(model: Any, steps: int, x0: dict | None = None) -> Any:
        def callback(step: int, denoised: torch.Tensor, x: torch.Tensor, total: int) -> None:
            reported.append((step, total, tuple(denoised.shape)))

        return callback

    edit = Edit(host, model)
    monkeypatch.setattr(latent_preview, "prepare_callback", prepare)
    edit.run()
    assert reported == [(step, STEPS, (1, 4, 16, 16)) for step in range(STEPS)]


def test_interrupt(host: Host, model: Any) -> None:
    """Protects: the host's interrupt ends a run inside the loss's own forward, and the next run is as
    before.
    """
    edit = Edit(host, model)
    before = edit.run()
    interrupted = comfy.model_management.InterruptProcessingException
    handle = None

    def interrupt(*_: Any) -> None:
        if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            comfy.model_management.interrupt_current_processing()

    handle = model.model.diffusion_model.middle_block[0].register_forward_hook(interrupt)
    try:
        with pytest.raises(interrupted):
            edit.run()
    finally:
        handle.remove()
        comfy.model_management.interrupt_current_processing(False)
    assert torch.equal(edit.run(), before)


def test_controlnet(host: Host, model: Any) -> None:
    """Protects: a ControlNet in the edit conditioning takes part, although the host adds its residuals in
    place.
    """
    edit = Edit(host, model)
    plain = edit.run()
    edit.positive = [[edit.positive[0][0], {"control": FakeControl(), "control_apply_to_uncond": True}]]
    controlled = edit.run()
    assert bool(torch.isfinite(controlled).all())
    assert not torch.allclose(plain, controlled, atol=1e-3)


def test_regional_conditioning(host: Host, model: Any) -> None:
    """Protects: entries for an area take part in sampling, and the losses use the first one for the whole
    image.
    """
    edit = Edit(host, model)
    area = [small_models.conditioning(6)[0][0], {"area": (8, 8, 0, 0), "strength": 1.0}]
    edit.positive = [area, *edit.positive]
    assert bool(torch.isfinite(edit.run()).all())
    edit.positive = [area]
    with pytest.raises(
        Exception, match=r"UnifyEdit Sampler: the guider's positive .* no entry for the whole"
    ):
        edit.run()


def test_lora_in_both(host: Host, model: Any) -> None:
    """Protects: a LoRA that inversion and guider share works, and the base weights come back."""
    patched = model.clone()
    weight = "diffusion_model.middle_block.1.proj_in.weight"
    delta = 0.3 * torch.randn(model.model.state_dict()[weight].shape)
    patched.add_patches({weight: (delta,)})
    clean = {name: value.clone().cpu() for name, value in model.model.state_dict().items()}
    edit = Edit(host, patched)
    assert bool(torch.isfinite(edit.run()).all())
    patched.detach()
    assert all(torch.equal(value.cpu(), clean[name]) for name, value in model.model.state_dict().items())


def test_mask_of_the_same_proportions(host: Host, model: Any) -> None:
    """Protects: a mask of another size but the same proportions is resized: the same edit as at the
    image's size.
    """
    edit = Edit(host, model, steps=1)
    mask = torch.zeros(1, SIZE, SIZE)
    mask[:, :64, :32] = 1
    results = []
    for given in (mask, mask[:, ::4, ::4]):
        edit.sampler_inputs["mask"] = given
        results.append(edit.run())
    torch.testing.assert_close(results[0], results[1])


def test_steps_without_a_gradient(host: Host, model: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Protects: no usable gradient in any step is an error; in some steps it is a warning with their
    number.
    """
    edit = Edit(host, model)
    target = host.pack_module("patches.unify.target")
    loss_gradients = target.loss_gradients
    broken = {0}

    def sometimes(losses: Any, *rest: Any, **more: Any) -> Any:
        step = len(seen) // 2  # two losses a step
        seen.extend(losses)
        found = loss_gradients(losses, *rest, **more)
        return [gradient * math.nan if step in broken else gradient for gradient in found]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, "loss_gradients", sometimes)
        seen: list[Any] = []
        with caplog.at_level(logging.WARNING):
            assert bool(torch.isfinite(edit.run()).all())
        assert "1 of 3 gradient steps had no usable gradient" in caplog.text
        assert edit.trace().usable.tolist() == [[False], [True], [True]]
        broken |= {1, 2}
        seen.clear()
        with pytest.raises(Exception, match="UnifyEdit Sampler: no step had a usable gradient for image 1"):
            edit.run()

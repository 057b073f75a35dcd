"""The attention bridge on DiTs where it has the slot of the attention itself: SD3.5, Qwen-Image."""

from __future__ import annotations

from typing import Any

import bridge_edit
import memory_modes
import pytest
import small_dits
import small_models
import torch
from closeness import same
from dit_formula import Blocks, Formula
from host import Host
from unify_edit import FakeControl

FAMILIES = tuple(small_dits.OTHERS)
OVERRIDE = "optimized_attention_override"


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """The random networks, by family."""
    return {name: small_dits.small_dit(name) for name in FAMILIES}


def _bridged(host: Host, model: Any, reference: torch.Tensor | None = None, **inputs: Any) -> Any:
    """MODEL with a random bridge."""
    bridge = bridge_edit.random_bridge(host, model)
    reference = small_models.latent(9, model=model) if reference is None else reference
    return bridge_edit.apply_bridge(host, model, bridge, reference, **inputs)


def _close(found: torch.Tensor | None, expected: torch.Tensor) -> None:
    """Equal to what float32 can hold."""
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


class _Override:
    """Another pack's function in place of every attention, which notes what it is given."""

    def __init__(self) -> None:
        self.seen: list[tuple] = []

    def __call__(self, backend: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        options = kwargs["transformer_options"]
        self.seen.append((q.shape, v.shape, options[OVERRIDE] is self, sorted(kwargs)))
        return 1.1 * backend(q, k, v, *args, **kwargs)

    def on(self, model: Any) -> Any:
        """MODEL with it."""
        model = model.clone()
        model.model_options["transformer_options"][OVERRIDE] = self
        return model


@pytest.mark.parametrize("family", FAMILIES)
def test_another_packs_attention(host: Host, models: dict[str, Any], family: str) -> None:
    """Protects: another pack's function in the attention's slot is called with what the host gives it in a
    stock run, itself in the options, and its result goes on; it computes the bridge's attention too.
    """
    model, stock, other = models[family], _Override(), _Override()
    plain = bridge_edit.sample(host, stock.on(model), steps=1)
    silent = _bridged(host, model, start_percent=0.4, end_percent=0.45)
    assert torch.equal(bridge_edit.sample(host, _Override().on(silent), steps=1), plain)
    found = bridge_edit.sample(host, other.on(_bridged(host, model)), steps=1)
    layers = len(host.network(model).layers)
    assert len(stock.seen) == layers
    assert [call for call in other.seen if call[0][0] == 2 and call in stock.seen] == stock.seen
    assert len(other.seen) == layers - 1 + 2 * layers  # the last layer's own is not computed in the reading
    assert all(own for _, _, own, _ in other.seen)
    assert not torch.equal(found, plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_node_around_a_block(host: Host, models: dict[str, Any], family: str) -> None:
    """Protects: another pack's function around a block sees the block's arguments as in a stock run, and may
    change them: the bridge is inside of it.
    """
    model, seen = models[family], []

    def around(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        seen.append((tuple(args["img"].shape), OVERRIDE in args["transformer_options"]))
        return extra["original_block"]({**args, "img": 0.9 * args["img"]})

    bridge = bridge_edit.random_bridge(host, model)
    patched = bridge_edit.apply_bridge(host, model, bridge, small_models.latent(9, model=model))
    patched.set_model_patch_replace(around, "dit", "double_block", 1)
    with Blocks(model) as blocks:
        bridge_edit.sample(host, patched, steps=1)
    assert seen == [((2, 64, next(iter(bridge.model.settings.widths.values()))), False)]
    for key, (read, call) in blocks.calls.items():
        formula = Formula(model, bridge, key)
        grid = formula.grid(8, 8)
        own = formula.own(call, grid)
        expected = own + formula.change(own, formula.bridged(call, grid, read, grid))
        _close(call.result, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_however_weights_are_kept(host: Host, models: dict[str, Any], family: str) -> None:
    """Protects: layers without weights until they are loaded, or with streamed ones, give the same bits."""
    expected = bridge_edit.sample(host, _bridged(host, models[family]), steps=2)
    for mode, context in memory_modes.MODES.items():
        if mode != "resident":
            with context():
                model = small_dits.small_dit(family)
                assert torch.equal(bridge_edit.sample(host, _bridged(host, model), steps=2), expected), mode


@pytest.mark.parametrize(("family", "dtype"), [("SD3.5", torch.float16), ("Qwen-Image", torch.bfloat16)])
def test_half_precision(host: Host, family: str, dtype: torch.dtype) -> None:
    """Protects: a base in half precision runs, and at strength 0 gives its own bits."""
    model = small_dits.small_dit(family, dtype=dtype)
    stock, silent, found = (
        bridge_edit.sample(host, which, steps=2)
        for which in (model, _bridged(host, model, strength=0.0), _bridged(host, model))
    )
    assert torch.equal(silent, stock)
    assert found.isfinite().all()
    assert not torch.equal(found, stock)


class _Control(FakeControl):
    """A ControlNet with a residual on the image's tokens after some blocks."""

    def get_control(self, x: torch.Tensor, *_: Any) -> dict[str, list[Any]]:
        """Residuals where the host's SD3 and Qwen-Image take them."""
        residual = x.flatten(1).mean(1)[:, None, None]
        return {"output": [residual.expand(-1, 64, 128)] * 3, "input": [residual.expand(-1, 64, 64)] * 3}


@pytest.mark.parametrize("family", FAMILIES)
def test_control_net_and_lora(host: Host, models: dict[str, Any], family: str) -> None:
    """Protects: a ControlNet steers the image and not the reference pass, which is read once at timestep 0;
    a LoRA acts before or after the bridge alike, in both.
    """
    import comfy.sd

    model, calls = models[family], []

    def note(_: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        calls.append((len(args[0]), float(args[1].max()), kwargs.get("control") is not None))

    positive = [[text, {**values, "control": _Control()}] for text, values in small_models.conditioning(2)]
    patched = _bridged(host, model)
    handle = model.model.diffusion_model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        found = bridge_edit.sample(host, patched, positive, positive, steps=2)
    finally:
        handle.remove()
    assert calls[0] == (1, 0.0, False)
    assert [(rows, control) for rows, _, control in calls[1:]] == [(2, True)] * 2
    plain = bridge_edit.sample(host, patched, steps=2)
    assert not torch.equal(found, plain)

    generator, lora = torch.Generator().manual_seed(11), {}
    for name, weight in model.model.diffusion_model.state_dict().items():
        if name.endswith(("qkv.weight", "to_k.weight")):
            key = f"diffusion_model.{name.removesuffix('.weight')}"
            lora[f"{key}.lora_down.weight"] = torch.randn(4, weight.shape[1], generator=generator) / 8
            lora[f"{key}.lora_up.weight"] = torch.randn(weight.shape[0], 4, generator=generator) / 4
    before, _ = comfy.sd.load_lora_for_models(model, None, lora, 0.8, 0.0)
    after, _ = comfy.sd.load_lora_for_models(patched, None, lora, 0.8, 0.0)
    found = bridge_edit.sample(host, after, steps=2)
    assert torch.equal(bridge_edit.sample(host, _bridged(host, before), steps=2), found)
    assert not torch.equal(found, plain)


def test_positions_of_sd3(host: Host, models: dict[str, Any]) -> None:
    """Protects: where a part of the image has other positions than the same part of the reference, which the
    bridge cannot move, it is refused: a reference of another size, an area, tiles.
    """
    model = models["SD3.5"]
    patched = _bridged(host, model, small_models.latent(9, size=(8, 20), model=model))
    with pytest.raises(ValueError, match=r"this MODEL is a Stable Diffusion 3, which .* 16x16, but .* 20x8"):
        bridge_edit.sample(host, patched)
    (area,) = host.execute(
        "ConditioningSetArea",
        conditioning=small_models.conditioning(2),
        width=64,
        height=96,
        x=32,
        y=16,
        strength=1.0,
    )
    with pytest.raises(
        ValueError, match=r"Apply Attention Bridge: a conditioning has an area, .* take the area"
    ):
        bridge_edit.sample(host, _bridged(host, model), area)


def test_positions_of_qwen_image(host: Host, models: dict[str, Any]) -> None:
    """Protects: positions are counted from the middle: a reference of another size lies corner on corner with
    the image, its text beside them as beside the image; an area's queries look at its place.
    """
    model = models["Qwen-Image"]
    bridge = bridge_edit.random_bridge(host, model)
    reference = small_models.latent(9, size=(8, 20), model=model)
    with Blocks(model) as seen:
        bridge_edit.sample(host, bridge_edit.apply_bridge(host, model, bridge, reference), steps=1)
    for key, (read, call) in seen.calls.items():
        formula = Formula(model, bridge, key)
        grid, there = formula.grid(8, 8), formula.grid(4, 10, (7 / 3, 7 / 9), (2 - 4, 5 - 4))
        own = formula.own(call, grid)
        _close(call.result, own + formula.change(own, formula.bridged(call, grid, read, there)))
        if read.result is not None:
            _close(read.result, formula.own(read, there))
    (area,) = host.execute(
        "ConditioningSetArea",
        conditioning=small_models.conditioning(2),
        width=64,
        height=96,
        x=0,
        y=32,
        strength=1.0,
    )
    patched = bridge_edit.apply_bridge(host, model, bridge, small_models.latent(9, model=model))
    with Blocks(model) as seen:
        bridge_edit.sample(host, patched, area, steps=1, cfg=1.0)
    for key, calls in seen.calls.items():
        formula = Formula(model, bridge, key)
        grid, moved = formula.grid(6, 4), formula.grid(6, 4, corner=(2 + 3 - 4, 0 + 2 - 4))
        own = formula.own(calls[-1], grid)
        answer = formula.bridged(calls[-1], moved, calls[0], formula.grid(8, 8))
        _close(calls[-1].result, own + formula.change(own, answer))


def test_frames(host: Host, models: dict[str, Any]) -> None:
    """Protects: Qwen-Image's latents have frames: one is an image, with or without its dimension, and several
    are refused by name, in the reference and in what is sampled.
    """
    model = models["Qwen-Image"]
    reference = small_models.latent(9, model=model)
    assert reference.shape == (1, 16, 1, 16, 16)
    found = bridge_edit.sample(host, _bridged(host, model, reference), steps=1)
    assert found.shape == (1, 16, 1, 16, 16)
    flat = _bridged(host, model, reference[:, :, 0])
    assert torch.equal(bridge_edit.sample(host, flat, steps=1), found)
    with pytest.raises(
        ValueError, match=r"Bridge: reference has shape \[1, 16, 3, 16, 16\], a video of 3 frames"
    ):
        _bridged(host, model, reference.repeat(1, 1, 3, 1, 1))
    with pytest.raises(ValueError, match=r"Apply Attention Bridge: the latent has 3 frames, but a bridge"):
        bridge_edit.sample(host, flat, latent=torch.zeros(1, 16, 3, 16, 16), steps=1)


def test_a_mask_in_the_text(host: Host, models: dict[str, Any]) -> None:
    """Protects: a description whose last tokens are hidden by a mask is read as the same one without them."""
    model = models["Qwen-Image"]
    ((text, values),) = small_models.conditioning(1, tokens=12)
    hidden = [[text, {**values, "attention_mask": torch.tensor([[1] * 9 + [0] * 3])}]]
    found = [
        bridge_edit.sample(host, _bridged(host, model, source=source), steps=1)
        for source in (hidden, [[text[:, :9], values]], [[text, values]])
    ]
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


@pytest.mark.parametrize(("family", "name"), [("SD3.5", "Stable Diffusion 3"), ("Qwen-Image", "Qwen-Image")])
def test_what_reads_attention(host: Host, models: dict[str, Any], family: str, name: str) -> None:
    """Protects: UnifyEdit, inversion and attention maps refuse these families by name, with what does run."""
    import unify_edit

    tokens, _ = host.execute(
        "DescEditFindTokens",
        clip=unify_edit.tokenizer_only_clip(),
        source_description="a red circle",
        edit_description="a green circle",
    )
    model = models[family]
    text, latent = small_models.conditioning(1), {"samples": small_models.latent(3, model=model)}
    message = f"{name} does not run here yet, only with an attention bridge, dual guidance"
    with pytest.raises(ValueError, match=f"UnifyEdit: {message}"):
        host.execute("DescEditUnify", model=model, source=text, edit=text, edit_tokens=tokens, latent=latent)
    (sigmas,) = host.execute("BasicScheduler", model=model, scheduler="normal", steps=2, denoise=1.0)
    with pytest.raises(ValueError, match=rf"Invert Image \(DDIM\): {message}"):
        host.execute("DescEditInvert", model=model, source=text, latent=latent, sigmas=sigmas)
    with pytest.raises(ValueError, match=f"Attention Maps: {message}"):
        host.execute(
            "DescEditAttentionMaps", model=model, conditioning=text, edit_tokens=tokens, latent=latent
        )

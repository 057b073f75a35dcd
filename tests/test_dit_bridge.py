"""The attention bridge on DiTs: its numbers at every layer, and what is read when."""

from __future__ import annotations

from typing import Any

import bridge_edit
import pytest
import small_dits
import small_models
import torch
from closeness import same
from dit_formula import Blocks, Call, Formula
from host import Host
from unify_edit import FakeControl

FAMILIES = *small_dits.FAMILIES, *small_dits.OTHERS
CASES = [
    ("edit_queries", "linear", 0, False),
    ("edit_queries", "linear", 6, False),
    ("edit_queries", "linear", 6, True),
    ("edit_queries", "replace", 0, False),
    ("reference_queries", "linear", 0, False),
    ("reference_queries", "linear", 6, False),
    ("reference_queries", "add", 0, True),
]


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """The random networks, by family."""
    return {name: small_dits.small_dit(name) for name in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("direction", "fusion", "fuse_rank", "self_bridge"), CASES)
def test_every_layer(
    host: Host,
    models: dict[str, Any],
    family: str,
    direction: str,
    fusion: str,
    fuse_rank: int,
    self_bridge: bool,
) -> None:
    """Protects: at every block, the image's tokens get Z + strength F(Z') before the output projection, in
    both rows of a step, with the direction's q, k and v, both sides rotated by the same positions; the
    reference's get what the network gives them, or pass the bridge where it was trained so.
    """
    model = models[family]
    bridge = bridge_edit.random_bridge(
        host,
        model,
        direction=direction,
        fusion=fusion,
        fuse_rank=fuse_rank,
        reference_self_bridge=self_bridge,
    )
    patched = bridge_edit.apply_bridge(host, model, bridge, small_models.latent(9, model=model), strength=0.7)
    with Blocks(model) as seen:
        bridge_edit.sample(host, patched, steps=1)
    side = 16 // model.model.diffusion_model.patch_size
    assert len(seen.calls) == 5
    for key, (reference, call) in seen.calls.items():
        formula = Formula(model, bridge, key)
        grid = formula.grid(side, side)
        pair = (call, reference) if direction == "edit_queries" else (reference, call)
        answer = formula.bridged(pair[0], grid, pair[1], grid)
        own = formula.own(call, grid)
        _close(call.result, own + 0.7 * formula.change(own, answer))
        if self_bridge:
            own, answer = formula.own(reference, grid), formula.bridged(reference, grid, reference, grid)
            _close(reference.result, own + formula.change(own, answer))
        elif reference.result is not None:
            _close(reference.result, formula.own(reference, grid))


def _close(found: torch.Tensor | None, expected: torch.Tensor) -> None:
    """Equal to what float32 can hold."""
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def _bridged(host: Host, model: Any, reference: torch.Tensor | None = None, **inputs: Any) -> tuple[Any, Any]:
    """A bridge with the direction edit_queries, and the MODEL with it."""
    bridge = bridge_edit.random_bridge(host, model, fuse_rank=0)
    reference = small_models.latent(9, model=model) if reference is None else reference
    return bridge, bridge_edit.apply_bridge(host, model, bridge, reference, **inputs)


@pytest.mark.parametrize("family", ["Flux.1 dev", "Flux.2"])
def test_a_reference_of_another_size(host: Host, models: dict[str, Any], family: str) -> None:
    """Protects: the reference's corners lie on the image's corners, however many tokens it has; positions
    that another node scales and moves hold for both.
    """
    model = models[family]
    reference = small_models.latent(9, size=(8, 20), model=model)
    bridge, patched = _bridged(host, model, reference)
    (moved,) = host.execute(
        "ScaleROPE",
        model=patched,
        scale_x=2.0,
        scale_y=0.5,
        shift_x=0.0,
        shift_y=3.0,
        scale_t=1.0,
        shift_t=0.0,
    )
    patch = model.model.diffusion_model.patch_size
    side, rows, columns = 16 // patch, 8 // patch, 20 // patch
    for run, scale, corner in ((patched, (1.0, 1.0), (0.0, 0.0)), (moved, (0.5, 2.0), (3.0, 0.0))):
        with Blocks(model) as seen:
            bridge_edit.sample(host, run, steps=1)
        spans = scale[0] * (side - 1) / (rows - 1), scale[1] * (side - 1) / (columns - 1)
        for key, (read, call) in seen.calls.items():
            formula = Formula(model, bridge, key)
            grid = formula.grid(side, side, scale, corner)
            own = formula.own(call, grid)
            answer = formula.bridged(call, grid, read, formula.grid(rows, columns, spans, corner))
            _close(call.result, own + formula.change(own, answer))


def test_chroma_needs_a_reference_of_its_size(host: Host, models: dict[str, Any]) -> None:
    """Protects: Chroma, which cannot scale positions, refuses a reference of another size."""
    reference = small_models.latent(9, size=(8, 20), model=models["Chroma"])
    _, patched = _bridged(host, models["Chroma"], reference)
    with pytest.raises(
        ValueError, match=r"Apply Attention Bridge: this MODEL is a Chroma, .* 16x16, but .* 20x8"
    ):
        bridge_edit.sample(host, patched)


@pytest.mark.parametrize("family", ["Flux.1 dev", "Flux.2", "Chroma"])
def test_an_area_looks_at_its_place(host: Host, models: dict[str, Any], family: str) -> None:
    """Protects: where a conditioning's area shows the network a part of the latent, whose positions begin at
    0, its queries look at the same part of the reference.
    """
    model = models[family]
    bridge, patched = _bridged(host, model)
    (area,) = host.execute(
        "ConditioningSetArea",
        conditioning=small_models.conditioning(2),
        width=64,
        height=96,
        x=32,
        y=16,
        strength=1.0,
    )
    with Blocks(model) as seen:
        bridge_edit.sample(host, patched, area, steps=1, cfg=1.0)
    patch = model.model.diffusion_model.patch_size
    for key, calls in seen.calls.items():
        formula = Formula(model, bridge, key)
        grid = formula.grid(12 // patch, 8 // patch)
        there = formula.grid(16 // patch, 16 // patch)
        moved = formula.grid(12 // patch, 8 // patch, corner=(2 / patch, 4 / patch))
        own = formula.own(calls[-1], grid)
        answer = formula.bridged(calls[-1], moved, calls[0], there)
        _close(calls[-1].result, own + formula.change(own, answer))


def test_joined_references(host: Host, models: dict[str, Any]) -> None:
    """Protects: references that are joined answer together, as one sequence, all on the same positions."""
    model = models["Flux.1 dev"]
    references = small_models.latent(9, batch=2, model=model)
    bridge, patched = _bridged(host, model, references, references="all for every image")
    with Blocks(model) as seen:
        bridge_edit.sample(host, patched, steps=1)
    for key, (read, call) in seen.calls.items():
        formula = Formula(model, bridge, key)
        grid = formula.grid(8, 8)
        q, k, v = (torch.cat(list(x[:, :, read.text :]), dim=1)[None] for x in (read.q, read.k, read.v))
        both = Call(q, k, v, 0)
        own = formula.own(call, grid)
        answer = formula.bridged(call, grid, both, torch.cat([grid, grid]))
        _close(call.result, own + formula.change(own, answer))


def test_a_mask(host: Host, models: dict[str, Any]) -> None:
    """Protects: a soft mask weighs the bridge at each token, by the share of its area that it covers."""
    model, mask = models["Flux.1 dev"], torch.zeros(1, 128, 128)
    mask[:, 16:72, 24:] = 0.5
    bridge, patched = _bridged(host, model, mask=mask)
    with Blocks(model) as seen:
        bridge_edit.sample(host, patched, steps=1)
    share = mask[0].reshape(8, 16, 8, 16).mean((1, 3)).double().reshape(1, -1, 1)
    for key, (read, call) in seen.calls.items():
        formula = Formula(model, bridge, key)
        grid = formula.grid(8, 8)
        own = formula.own(call, grid)
        _close(call.result, own + share * formula.change(own, formula.bridged(call, grid, read, grid)))


def _kontext(host: Host, model: Any, method: str) -> Any:
    """A CONDITIONING with a reference latent, whose tokens follow the image's."""
    (positive,) = host.execute(
        "ReferenceLatent",
        conditioning=small_models.conditioning(2),
        latent={"samples": small_models.latent(8, size=(8, 12), model=model)},
    )
    (positive,) = host.execute(
        "FluxKontextMultiReferenceLatentMethod", conditioning=positive, reference_latents_method=method
    )
    return positive


@pytest.mark.parametrize(
    ("family", "method"),
    [
        *(("Flux.1 dev", method) for method in ("offset", "index", "uxo/uso")),
        *(("Flux.2", method) for method in ("index", "index_timestep_zero")),
        ("Qwen-Image", "index_timestep_zero"),
    ],
)
def test_reference_latents_stay_as_they_are(
    host: Host, models: dict[str, Any], family: str, method: str
) -> None:
    """Protects: reference latents of the conditioning (Kontext), whose tokens follow the image's, are neither
    in the reference pass nor changed by the bridge, which acts on the image's tokens alone; in the first
    block, where both runs still have the same q, k and v, the change is the formula's.
    """
    model = models[family]
    bridge, patched = _bridged(host, model)
    positive = _kontext(host, model, method)
    with Blocks(model) as stock:
        bridge_edit.sample(host, model, positive, steps=1, cfg=1.0)
    with Blocks(model) as seen:
        bridge_edit.sample(host, patched, positive, steps=1, cfg=1.0)
    key, side = "double_block.0.0", 16 // model.model.diffusion_model.patch_size
    (plain,), (read, call) = stock.calls[key], seen.calls[key]
    assert read.q.shape[2] - read.text == side * side
    assert call.q.shape[2] - call.text > side * side
    formula = Formula(model, bridge, key)
    grid = formula.grid(side, side)
    _close(call.k, plain.k)
    assert plain.result is not None
    own, references = plain.result[:, : side * side], plain.result[:, side * side :]
    change = formula.change(own, formula.bridged(call, grid, read, grid))
    _close(call.result, torch.cat([own + change, references], dim=1))


def test_the_hosts_cache_of_reference_latents(host: Host, models: dict[str, Any]) -> None:
    """Protects: beside the host's FluxKVCache, which cuts the tokens of reference latents away after the
    first step and adds their keys, the bridge still finds the image's tokens; with strength 0 nothing
    changes.
    """
    model = models["Flux.2"]
    positive, found = _kontext(host, model, "index_timestep_zero"), []
    for strength in (None, 0.0, 1.0):
        (cached,) = host.execute("FluxKVCache", model=model)
        if strength is not None:
            _, cached = _bridged(host, cached, strength=strength)
        with Blocks(model) as seen:
            found.append(bridge_edit.sample(host, cached, positive, positive, steps=2))
    assert torch.equal(found[0], found[1])
    read, first, second = seen.calls["double_block.0.0"]
    assert first.q.shape[2] - first.text == 256 + 96
    assert second.q.shape[2] - second.text == read.q.shape[2] - read.text == 256
    assert found[2].isfinite().all()
    assert not torch.equal(found[2], found[0])


class _Control(FakeControl):
    """A ControlNet with a residual on the image's tokens after the first block of each kind."""

    def get_control(self, x: torch.Tensor, *_: Any) -> dict[str, list[Any]]:
        """Residuals as the host's Flux takes them."""
        residual = x.mean((1, 2, 3))[:, None, None].expand(-1, 64, 64)
        return {"input": [residual], "output": [residual]}


def test_control_net_and_guidance(host: Host, models: dict[str, Any]) -> None:
    """Protects: a ControlNet steers the image and not the reference pass, which is read once, at timestep 0,
    without guidance's scale (1 where it is embedded), whatever its description carries.
    """
    calls: list[tuple] = []

    def note(_: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        guidance = kwargs["guidance"].tolist()
        calls.append((len(args[0]), float(args[1].max()), guidance, kwargs.get("control") is not None))

    (source,) = host.execute("FluxGuidance", conditioning=small_models.conditioning(1), guidance=7.0)
    positive = [[text, {**values, "control": _Control()}] for text, values in small_models.conditioning(2)]
    for family, scales in (("Flux.1 dev", (1.0, 3.5)), ("Chroma", (0.0, 0.0))):
        model = models[family]
        _, patched = _bridged(host, model, source=source)
        handle = model.model.diffusion_model.register_forward_pre_hook(note, with_kwargs=True)
        try:
            found = bridge_edit.sample(host, patched, positive, positive, steps=2)
        finally:
            handle.remove()
        read, *steps = calls
        assert read == (1, 0.0, [scales[0]], False)
        assert [(rows, guidance, control) for rows, _, guidance, control in steps] == [
            (2, [scales[1]] * 2, True)
        ] * 2
        assert not torch.equal(found, bridge_edit.sample(host, patched, steps=2))
        calls.clear()


def test_lora_reaches_both_readings(host: Host, models: dict[str, Any]) -> None:
    """Protects: a LoRA on the base acts in the image's and in the reference's projections, and it does not
    matter whether it comes before or after the bridge.
    """
    import comfy.sd

    model, generator = models["Flux.1 dev"], torch.Generator().manual_seed(11)
    lora = {}
    for name, weight in model.model.diffusion_model.state_dict().items():
        if name.endswith(("qkv.weight", "linear1.weight")):
            key = f"diffusion_model.{name.removesuffix('.weight')}"
            lora[f"{key}.lora_down.weight"] = torch.randn(4, weight.shape[1], generator=generator) / 8
            lora[f"{key}.lora_up.weight"] = torch.randn(weight.shape[0], 4, generator=generator) / 4
    before, _ = comfy.sd.load_lora_for_models(model, None, lora, 0.8, 0.0)
    _, before = _bridged(host, before)
    _, bridged = _bridged(host, model)
    after, _ = comfy.sd.load_lora_for_models(bridged, None, lora, 0.8, 0.0)
    with Blocks(model) as plain:
        bridge_edit.sample(host, bridged, steps=1)
    with Blocks(model) as seen:
        found = bridge_edit.sample(host, after, steps=1)
    assert torch.equal(bridge_edit.sample(host, before, steps=1), found)
    for reading, other in zip(seen.calls["double_block.0.0"], plain.calls["double_block.0.0"], strict=True):
        assert not torch.equal(reading.k, other.k)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.bfloat16])
def test_base_in_another_precision(host: Host, dtype: torch.dtype) -> None:
    """Protects: the bridge never reads the base's weights, so that they may be of any kind that the host
    runs: of eight bits, or half precision.
    """
    model = small_dits.small_dit("Flux.1 dev", dtype=dtype)
    bridge, patched = _bridged(host, model)
    with Blocks(model) as seen:
        bridge_edit.sample(host, patched, steps=1)
    for key, (read, call) in seen.calls.items():
        formula = Formula(model, bridge, key)
        grid = formula.grid(8, 8)
        own = formula.own(call, grid)
        _close(call.result, own + formula.change(own, formula.bridged(call, grid, read, grid)))


def test_another_packs_attention_is_used(host: Host, models: dict[str, Any]) -> None:
    """Protects: an override of the host's attention computes the bridge's too, and the reference pass's."""
    model, seen = models["Flux.1 dev"], []

    def override(backend: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(args[0].shape[-2])
        return backend(*args, **kwargs)

    _, patched = _bridged(host, model)
    expected = bridge_edit.sample(host, patched, steps=2)
    other = patched.clone()
    other.model_options["transformer_options"]["optimized_attention_override"] = override
    assert torch.equal(bridge_edit.sample(host, other, steps=2), expected)
    assert len(seen) == 4 + 2 * 10  # the last block's own attention is not computed in the reference pass


def test_each_image_has_its_reference(host: Host, models: dict[str, Any]) -> None:
    """Protects: n references for n images are paired in order, in both rows of each."""
    model = models["Flux.1 dev"]
    references, latent = small_models.latent(9, batch=3, model=model), torch.zeros(3, 16, 16, 16)
    _, together = _bridged(host, model, references)
    found = bridge_edit.sample(host, together, latent=latent, steps=2)
    for image in range(3):
        _, alone = _bridged(host, model, references[image : image + 1])
        assert same(bridge_edit.sample(host, alone, latent=latent, steps=2)[image], found[image])


def test_a_model_with_an_image_channel(host: Host) -> None:
    """Protects: Flux.1 that takes an image beside the latent (Depth, Canny, Fill) reads the reference with
    the channels that it needs, zeros where the source description has none.
    """
    model = small_dits.small_dit("Flux.1 dev", in_channels=32)
    bridge, patched = _bridged(host, model)
    with Blocks(model) as seen:
        found = bridge_edit.sample(host, patched, steps=1)
    for key, (read, call) in seen.calls.items():
        formula = Formula(model, bridge, key)
        grid = formula.grid(8, 8)
        own = formula.own(call, grid)
        _close(call.result, own + formula.change(own, formula.bridged(call, grid, read, grid)))
    assert not torch.equal(found, bridge_edit.sample(host, model, steps=1))


@pytest.mark.parametrize("direction", ["edit_queries", "reference_queries"])
def test_memory_is_asked_for(
    host: Host, models: dict[str, Any], direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects: the host is asked for what a run keeps of the reference at every block, K and V or Q, and for
    the bridge's own weights.
    """
    import comfy.model_management

    asked: list[float] = []
    real = comfy.model_management.load_models_gpu

    def load(models: Any, memory_required: float = 0, *args: Any, **kwargs: Any) -> Any:
        asked.append(memory_required)
        return real(models, memory_required, *args, **kwargs)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", load)
    model = models["Flux.1 dev"]
    bridge = bridge_edit.random_bridge(host, model, direction=direction, fuse_rank=6)
    patched = bridge_edit.apply_bridge(host, model, bridge, small_models.latent(9, model=model))
    for which in (model, patched):
        bridge_edit.sample(host, which, steps=1)
    kept = 5 * 64 * 64 * (2 if direction == "edit_queries" else 1)
    weights = 5 * (3 * 2 * 64 * 4 + 2 * 64 * 6)
    assert asked[1] - asked[0] >= 4 * (kept + weights)

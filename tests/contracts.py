"""What every patch of this pack keeps, on every kind of network: one suite over METHODS and KINDS.

A method joins by a class in METHODS, a kind of network by a line in `small_models.KINDS`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import bridge_edit
import comfy.model_management
import comfy.model_patcher
import memory_modes
import pytest
import small_models
import torch
from bridge_edit import apply_bridge, counted, random_bridge, sample
from closeness import same
from host import Host
from unify_edit import Edit, euler

Inputs = tuple[dict[str, Any], ...]
WITHOUT_AREAS = tuple(name for name in bridge_edit.LAYOUTS if name not in ("an area", "a mask"))


@dataclass(frozen=True)
class Graph:
    """What a method is run in: conditionings, images, latent size, steps."""

    positive: Any = field(default_factory=lambda: small_models.conditioning(2))
    negative: Any = field(default_factory=lambda: small_models.conditioning(4))
    images: int = 1
    size: tuple[int, int] = (16, 16)
    steps: int = 2

    def sample(self, host: Host, model: Any) -> torch.Tensor:
        """The stock KSampler's latent."""
        latent = torch.zeros(self.images, 4, *self.size)  # the host gives an empty one its channels
        return sample(host, model, self.positive, self.negative, latent=latent, steps=self.steps)


class Bridge:
    """Apply Attention Bridge, in the stock KSampler."""

    direction = "edit_queries"
    # Inputs with which it changes nothing, and inputs with which it does what it does without them.
    neutral: ClassVar[Inputs] = (
        {"strength": 0.0},
        {"mask": torch.zeros(1, 128, 128)},
        {"start_percent": 0.4, "end_percent": 0.45},  # between two steps
    )
    redundant: ClassVar[Inputs] = ({"mask": torch.ones(1, 128, 128)},)
    layouts: tuple[str, ...] = bridge_edit.LAYOUTS
    rounding = 1  # how many times the tolerance a split for memory may change

    def __init__(self, host: Host, model: Any) -> None:
        self.host, self.model = host, model
        self.bridge = random_bridge(host, model, direction=self.direction)

    def patched(self, graph: Graph, **inputs: Any) -> Any:
        """MODEL with the patch."""
        reference = small_models.latent(9, size=graph.size, model=self.model)
        return apply_bridge(self.host, self.model, self.bridge, reference, **inputs)

    def run(self, graph: Graph, clone: bool = False, **inputs: Any) -> torch.Tensor:
        """The latent of a run with the patch, or with a clone of what has it."""
        model = self.patched(graph, **inputs)
        return graph.sample(self.host, model.clone() if clone else model)

    def stock(self, graph: Graph) -> torch.Tensor:
        """The latent of the same run without it."""
        return graph.sample(self.host, self.model)


class BridgeOfReference(Bridge):
    """The same, with the other direction, which cannot follow the area of a conditioning or of its mask."""

    direction = "reference_queries"
    layouts = WITHOUT_AREAS


class MaskedBridge(Bridge):
    """The same, where a mask says so."""

    neutral: ClassVar[Inputs] = ()
    redundant: ClassVar[Inputs] = ()

    def patched(self, graph: Graph, **inputs: Any) -> Any:
        """MODEL with the patch."""
        height, width = (8 * side for side in graph.size)
        mask = torch.zeros(1, height, width)
        mask[:, :, : width // 2] = 1
        return super().patched(graph, mask=mask, **inputs)


class DualGuidance(Bridge):
    """Dual Guidance with a bridge: three predictions a step."""

    neutral: ClassVar[Inputs] = ({"strength": 0.0, "image_guidance": 1.0, "text_guidance": 3.0},)
    redundant: ClassVar[Inputs] = ()

    def patched(self, graph: Graph, **inputs: Any) -> Any:
        """MODEL with the patch."""
        scales = {name: inputs.pop(f"{name}_guidance", 1.5) for name in ("image", "text")}
        (patched,) = self.host.execute(
            "DescEditDualGuidance",
            model=super().patched(graph, **inputs),
            image_guidance=scales["image"],
            text_guidance=scales["text"],
            formula="paper",
        )
        return patched


class Recorder(Bridge):
    """The attention recorder around every call, which must change nothing at all."""

    neutral: ClassVar[Inputs] = ({},)
    redundant: ClassVar[Inputs] = ()

    def __init__(self, host: Host, model: Any) -> None:
        self.host, self.model = host, model
        self.recorder = host.pack_module("patches.attention.recorder").AttentionRecorder

    def patched(self, graph: Graph, **inputs: Any) -> Any:
        """MODEL with the patch."""
        network = self.host.network(self.model)
        layers = network.layers.values()
        patched = self.model.clone()
        patched.model_options = self.recorder(network, layers, layers).attach(patched.model_options)
        return patched


class UnifyEdit(Bridge):
    """UnifyEdit's sampler, from an inverted latent."""

    rounding = 10  # where memory is short the rows run apart, and a gradient of fewer rows rounds differently
    neutral: ClassVar[Inputs] = ()
    redundant: ClassVar[Inputs] = ({"mask": torch.ones(1, 128, 128)},)
    layouts = ("three images", "an area")

    def __init__(self, host: Host, model: Any) -> None:
        self.host, self.model = host, model

    def _edit(self, graph: Graph) -> Edit:
        edit = Edit(self.host, self.model, graph.steps, graph.images, size=graph.size)
        edit.positive = graph.positive
        return edit

    def run(self, graph: Graph, clone: bool = False, **inputs: Any) -> torch.Tensor:
        """The latent of a run with the patch, or with a clone of what has it."""
        edit = self._edit(graph)
        edit.sampler_inputs.update(inputs)
        edit.model = edit.model.clone() if clone else edit.model
        return edit.run()

    def stock(self, graph: Graph) -> torch.Tensor:
        """The latent of the same run without it."""
        return self._edit(graph).run(euler(self.host))


METHODS = (Bridge, BridgeOfReference, MaskedBridge, DualGuidance, Recorder, UnifyEdit)
# Where a network is a variant of another, or its text is long, a part of the methods.
FEWER: dict[str, tuple[type[Bridge], ...]] = {
    "Flux.1 schnell": (Bridge, UnifyEdit),
    "Flux.2": (Bridge, BridgeOfReference),
    "SD3.5": (Bridge, DualGuidance),
    "Qwen-Image": (Bridge,),
}
# Every method on every kind of network that it runs on; and what has weights of its own, however the host
# keeps weights.
CASES = [
    *((method, kind, "resident") for kind in small_models.KINDS for method in FEWER.get(kind, METHODS)),
    *(
        (method, kind, mode)
        for mode in memory_modes.MODES
        for method, kind in (
            *((Bridge, "SD1.5"), (DualGuidance, "SD1.5"), (Bridge, "Flux.1 dev")),
            (UnifyEdit, "Flux.1 dev"),
        )
        if mode != "resident"
    ),
]


@pytest.fixture(scope="module")
def models() -> dict[Any, Any]:
    """The random networks that were made so far, by kind and mode, or by dtype."""
    return {}


def named(case: tuple[type[Bridge], str, str]) -> str:
    """What a case is called."""
    return "-".join((case[0].__name__, *case[1:]))


# For what does not depend on how weights are kept.
resident = pytest.mark.parametrize(
    "method", [case for case in CASES if case[2] == "resident"], ids=named, indirect=True
)


@pytest.fixture(params=CASES, ids=named)
def method(request: pytest.FixtureRequest, host: Host, models: dict[Any, Any]) -> Iterator[Bridge]:
    """A method for a network of a kind, with the weights kept as the host does in a mode."""
    method, kind, mode = request.param
    with memory_modes.MODES[mode]():
        if (kind, mode) not in models:
            models[kind, mode] = small_models.KINDS[kind]()
        made = method(host, models[kind, mode])
        if kind == "SD3.5":  # whose positions do not follow an area
            made.layouts = WITHOUT_AREAS
        if kind == "Qwen-Image":  # with which the host cannot find a mask's bounds
            made.layouts = tuple(name for name in made.layouts if name != "a mask")
        yield made


def test_neutral_inputs_change_no_bit(method: Bridge) -> None:
    """Protects: strength 0, an all-zero mask, a range without a step, and scales that ask for nothing give
    the bits of the unpatched model; inputs that say what holds anyway give the bits of the run without them.
    """
    graph = Graph(steps=3)
    stock, found = method.stock(graph), method.run(graph)
    assert same(found, stock) == isinstance(method, Recorder)
    for inputs in method.neutral:
        assert torch.equal(method.run(graph, **inputs), stock), inputs
    for inputs in method.redundant:
        assert torch.equal(method.run(graph, **inputs), found), inputs


def test_runs_repeat_and_leave_the_model_alone(method: Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: a second run and a clone give the same bits, also after one that was interrupted; the model,
    and a run of it without the patch, are as before.
    """
    graph, model = Graph(), method.model
    before, stock, first = small_models.fingerprint(model), method.stock(graph), method.run(graph)

    def stop(*_: Any) -> None:
        comfy.model_management.interrupt_current_processing()

    handle = model.model.diffusion_model.register_forward_pre_hook(stop)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            method.run(graph)
    finally:
        handle.remove()
    assert torch.equal(method.run(graph), first)
    assert torch.equal(method.run(graph, clone=True), first)
    assert torch.equal(method.stock(graph), stock)
    assert small_models.fingerprint(model) == before


def test_split_for_memory(host: Host, method: Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: in every layout of conditionings, one batch or one by one give the same latents."""
    layouts = bridge_edit.layouts(host)
    for name in method.layouts:
        graph = Graph(*layouts[name], steps=1)
        together = method.run(graph)
        with monkeypatch.context() as patch, counted(method.model) as calls:
            patch.setattr(comfy.model_patcher.ModelPatcher, "get_free_memory", lambda *_: 0)
            alone = method.run(graph)
        assert max(calls.rows) == graph.images, name
        assert same(alone, together, method.rounding), name


@resident
def test_any_size(method: Bridge) -> None:
    """Protects: latents whose grids are rounded up."""
    graph = Graph(size=(33, 23))
    found = method.run(graph)
    assert found.isfinite().all()
    assert same(found, method.stock(graph)) == isinstance(method, Recorder)


class _Others:
    """Another pack's patches in every attention slot, which note what they are given and change nothing."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def on(self, model: Any) -> Any:
        """MODEL with them."""
        patched = model.clone()
        for slot in ("attn1_patch", "attn2_patch"):
            patched.set_model_patch(self._inputs(slot), slot)
        for slot in ("attn1_output_patch", "attn2_output_patch"):
            patched.set_model_patch(self._output(slot), slot)
        for slot, block in (("attn1", ("middle", 0)), ("attn2", ("middle", 0)), ("attn1", ("output", 0))):
            patched.set_model_patch_replace(self._attention(slot), slot, *block)
        patched.set_model_patch_replace(self._block, "dit", "double_block", 1)
        return patched

    def _note(self, slot: str, tensor: torch.Tensor, options: dict[str, Any]) -> None:
        where = (*options.get("block", (options.get("block_type"),)), options["block_index"])
        rows, *shape = tensor.shape
        self.seen.append((slot, where, tuple(shape), rows, tuple(options["cond_or_uncond"])))

    def _inputs(self, slot: str) -> Any:
        def patch(
            n: torch.Tensor,
            context: Any,
            value: Any,
            options: Any = None,
            *,
            extra_options: Any = None,
            **_: Any,
        ) -> Any:
            self._note(slot, n, options or extra_options)
            return (n, context, value) if options else {}

        return patch

    def _output(self, slot: str) -> Any:
        def patch(out: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
            self._note(slot, out, options)
            return out

        return patch

    def _block(self, args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        self._note(
            "dit", args["img"], {**args["transformer_options"], "block": ("double", 1), "block_index": 1}
        )
        return extra["original_block"](args)

    def _attention(self, slot: str) -> Any:
        def replace(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]) -> Any:
            from comfy.ldm.modules.attention import optimized_attention

            self._note(f"{slot} replaced", q, options)
            return optimized_attention(q, k, v, options["n_heads"], transformer_options=options)

        return replace


@resident
def test_other_packs_see_a_stock_run(method: Bridge) -> None:
    """Protects: patches of other packs, in whatever slot, are chained: in each call of the network they are
    called at the same layers, with the same shapes and row numbers as in a stock run, and the result is the
    one without them.
    """
    graph, stock, others = Graph(steps=1), _Others(), _Others()
    plain, model = method.run(graph), method.model
    graph.sample(method.host, stock.on(model))
    method.model = others.on(model)
    assert torch.equal(method.run(graph), plain)
    assert {call[:3] for call in others.seen} == {call[:3] for call in stock.seen}
    for *_, rows, numbers in others.seen:
        assert set(numbers) <= {0, 1}
        assert rows == len(numbers) * graph.images


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", METHODS, ids=lambda kind: kind.__name__)
def test_half_precision(host: Host, models: dict[Any, Any], kind: type[Bridge], dtype: torch.dtype) -> None:
    """Protects: models in half precision run, neutral inputs change no bit of them, and others do."""
    if dtype not in models:
        models[dtype] = small_models.small_unet(dtype=dtype)
    method, graph = kind(host, models[dtype]), Graph(steps=3)
    found, stock = method.run(graph), method.stock(graph)
    assert found.isfinite().all()
    assert same(found, stock) == (kind is Recorder)
    for inputs in method.neutral:
        assert torch.equal(method.run(graph, **inputs), stock), inputs

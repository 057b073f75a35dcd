"""Dual guidance beside other packs: its rows are to them what rows of a stock run are, and its chains run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bridge_edit
import comfy.samplers
import pytest
import small_models
import torch
import unify_edit
from bridge_edit import apply_bridge, counted, guided, random_bridge, sample
from closeness import tolerance
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrappersMP
from host import Host, device

REFERENCE = small_models.latent(9)
EDIT, NOTHING = 2, 4
BLOCKS = [("input", 1), ("middle", 0), ("output", 1)]


@pytest.fixture(scope="module")
def model() -> Any:
    """A random UNet."""
    return small_models.small_unet()


@pytest.fixture(scope="module")
def bridge(host: Host, model: Any) -> Any:
    """A random bridge for it."""
    return random_bridge(host, model)


@pytest.fixture(params=["together", "split"])
def memory(request: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """Rows in one batch, and rows one by one because memory is short."""
    if request.param == "split":
        monkeypatch.setattr(type(model), "get_free_memory", lambda *_: 0)
    return request.param


def dual(host: Host, model: Any, image: float, text: float, formula: str = "paper") -> Any:
    """MODEL from the node for KSampler."""
    inputs = {"image_guidance": image, "text_guidance": text, "formula": formula}
    return host.execute("DescEditDualGuidance", model=model, **inputs)[0]


def close(found: torch.Tensor, expected: torch.Tensor, times: float = 1) -> None:
    """Equal to `times` what rounding may change."""
    torch.testing.assert_close(
        found.double(), expected.double(), rtol=0, atol=times * tolerance() * float(expected.std())
    )


def adapted(model: Any, reader: Callable[[dict], list[int]] = lambda extra: extra["cond_or_uncond"]) -> Any:
    """What an IP-Adapter does: to each row of the text attention it adds one of a list of two, by index."""
    patched = model.clone()
    generator = torch.Generator().manual_seed(3)
    tokens = [torch.randn(1, 1, 1024, generator=generator) for _ in range(2)]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: dict[str, Any]) -> torch.Tensor:
        own = optimized_attention(q, k, v, extra["n_heads"], attn_precision=extra.get("attn_precision"))
        index = reader(extra)
        images = len(q) // len(index)
        rows = [tokens[i][..., : q.shape[-1]].expand(images, -1, -1) for i in index]
        own[...] += torch.cat(rows).to(own)
        return own

    for block, number in BLOCKS:
        patched.set_model_attn2_replace(attend, block, number)
    return patched


def alone(host: Host, model: Any, text: bool) -> torch.Tensor:
    """One step's result with one row as a stock run computes it, in float64: a step is linear in it."""
    return sample(host, model, cfg=1.0 if text else 0.0, steps=1).double()


@pytest.mark.parametrize("formula", ["paper", "release"])
def test_formulas_beside_an_indexed_adapter(
    host: Host, model: Any, bridge: Any, memory: str, formula: str
) -> None:
    """Protects: each row gets what an adapter gives the same row of a stock run, batched or split."""
    plain = adapted(model)
    bridged = apply_bridge(host, plain, bridge, REFERENCE)
    both, seen = alone(host, bridged, True), alone(host, bridged, False)
    told, neither = alone(host, plain, True), alone(host, plain, False)
    expected = {
        "paper": neither + 1.5 * (seen - neither) + 3.0 * (both - seen),
        "release": seen + 3.0 * (both - seen) + 1.5 * (both - told),
    }[formula]
    close(sample(host, dual(host, bridged, 1.5, 3.0, formula), steps=1), expected)


@pytest.mark.parametrize(("image", "text"), [(4.0, 4.0), (1.0, 4.0), (1.5, 0.0), (1.0, 1.0)])
def test_scales_are_continuous(host: Host, model: Any, bridge: Any, image: float, text: float) -> None:
    """Protects: where a row's weight vanishes and it is left out, the picture does not jump, also beside an
    adapter that knows rows by index.
    """
    bridged = apply_bridge(host, adapted(model), bridge, REFERENCE)
    near = sample(host, dual(host, bridged, image + 1e-4, text), steps=1)
    close(sample(host, dual(host, bridged, image, text), steps=1), near, times=10)


class _Control(unify_edit.FakeControl):
    """A ControlNet that tells what it reads, and acts on rows of index 1 only."""

    def __init__(self, seen: list) -> None:
        self.seen = seen

    def get_control(self, x: torch.Tensor, *inputs: Any) -> dict[str, list[Any]]:
        """Residuals as the host's UNet takes them."""
        _, cond, batched, options = inputs
        assert cond["transformer_options"]["cond_or_uncond"] == options["cond_or_uncond"]
        self.seen.append((list(options["cond_or_uncond"]), list(options["uuids"])))
        act = [float(i == 1) for i in options["cond_or_uncond"]]
        scale = torch.tensor(act, device=x.device).repeat_interleave(len(x) // batched).view(-1, 1, 1, 1)
        residual = (scale * x.mean(dim=1, keepdim=True)).repeat(1, 32, 1, 1)
        return {"output": [residual, None, None, None, None, None]}


def controlled(text: int, control: Any) -> list:
    """A CONDITIONING with a ControlNet."""
    return [[tensor, {**values, "control": control}] for tensor, values in small_models.conditioning(text)]


def listening(model: Any) -> tuple[Any, dict[str, list]]:
    """The MODEL with a reader at every door where a pack can read indices, and what they read."""
    patched, seen = model.clone(), {name: [] for name in ("function", "apply", "unet", "attention")}

    def note(name: str, options: dict[str, Any]) -> None:
        seen[name].append((list(options["cond_or_uncond"]), list(options["uuids"])))

    def function(apply_model: Callable, args: dict[str, Any]) -> torch.Tensor:
        assert args["cond_or_uncond"] == args["c"]["transformer_options"]["cond_or_uncond"]
        note("function", args["c"]["transformer_options"])
        return apply_model(args["input"], args["timestep"], **args["c"])

    def wrapper(name: str) -> Callable:
        def wrap(executor: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
            note(name, kwargs.get("transformer_options", args[-1]))
            return executor(*args, **kwargs)

        return wrap

    def attention(q: torch.Tensor, context: Any, value: Any, extra: dict[str, Any]) -> tuple:
        if extra["block"] == ("middle", 0):
            note("attention", extra)
        return q, context, value

    patched.set_model_unet_function_wrapper(function)
    patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "reader", wrapper("apply"))
    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "reader", wrapper("unet"))
    patched.set_model_attn2_patch(attention)
    return patched, seen


@pytest.mark.parametrize("with_control", [False, True])
@pytest.mark.parametrize(
    ("formula", "image", "text", "positives", "expected"),
    [
        ("paper", 1.5, 3.0, 1, [0, 1, 1]),
        ("paper", 3.0, 3.0, 1, [0, 1]),
        ("paper", 1.5, 0.0, 1, [1, 1]),
        ("paper", 1.0, 0.0, 1, [1]),
        ("paper", 1.0, 1.0, 1, [0]),
        ("release", 1.5, 3.0, 1, [0, 0, 1]),
        ("release", 1.5, 1.0, 1, [0, 0]),
        ("release", 1.5, 3.0, 2, [0, 0, 0, 0, 1]),
        ("paper", 1.5, 3.0, 2, [0, 0, 1, 1]),
    ],
)
def test_every_reader_sees_a_stock_row(
    host: Host,
    model: Any,
    bridge: Any,
    memory: str,
    formula: str,
    image: float,
    text: float,
    positives: int,
    expected: list[int],
    with_control: bool,
) -> None:
    """Protects: at every door, a ControlNet's first, rows of the edit are 0 and unconditional ones 1; each
    has a uuid of its own, the same at every step; what fits in one call is one call.
    """
    heard, seen = listening(model)
    seen["control"] = []
    which = dual(host, apply_bridge(host, heard, bridge, REFERENCE), image, text, formula)
    control = _Control(seen["control"])
    texts = [EDIT, 6][:positives]
    make = (lambda seed: controlled(seed, control)) if with_control else small_models.conditioning
    positive = [entry for seed in texts for entry in make(seed)]
    steps = 2
    sample(host, which, positive, make(NOTHING), steps=steps)
    doors = [name for name in seen if name != "control" or with_control]
    for name in doors:
        # The bridge's reference pass is a call of the UNet alone.
        calls = [call for call in seen[name] if call[1] != [None]]
        assert len(calls) == steps * (1 if memory == "together" else len(expected)), name
        per_step = len(calls) // steps
        for step in range(steps):
            part = calls[step * per_step : (step + 1) * per_step]
            assert sorted(i for index, _ in part for i in index) == expected, name
            uuids = {uuid for _, ids in part for uuid in ids}
            assert len(uuids) == len(expected), name
            assert uuids == {uuid for _, ids in calls for uuid in ids}, name


def test_controlnet_acts_as_in_a_stock_run(host: Host, model: Any, bridge: Any, memory: str) -> None:
    """Protects: a ControlNet that goes by index gives each row its stock row's residual, and the rows stay
    one call.
    """
    control = _Control([])
    bridged = apply_bridge(host, model, bridge, REFERENCE)
    positive, negative = controlled(EDIT, control), controlled(NOTHING, control)

    def row(which: Any, cfg: float) -> torch.Tensor:
        return sample(host, which, positive, negative, cfg=cfg, steps=1).double()

    both, seen, neither = row(bridged, 1.0), row(bridged, 0.0), row(model, 0.0)
    with counted(model) as calls:
        found = sample(host, dual(host, bridged, 1.5, 3.0), positive, negative, steps=1)
    close(found, neither + 1.5 * (seen - neither) + 3.0 * (both - seen))
    assert calls.rows == ([1, 3] if memory == "together" else [1, 1, 1, 1])


def test_a_cache_by_uuid_keeps_rows_apart(host: Host, model: Any, bridge: Any, memory: str) -> None:
    """Protects: a node that keeps each row's output of the first step by uuid, as EasyCache does, finds it
    again: the run is then one of a constant prediction, the formula's.
    """
    kept: dict[Any, torch.Tensor] = {}

    def cache(executor: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
        options = kwargs.get("transformer_options", args[-1])
        if options["uuids"] == [None]:
            return executor(*args, **kwargs)
        if not all(uuid in kept for uuid in options["uuids"]):
            kept.update(zip(options["uuids"], executor(*args, **kwargs).split(1), strict=True))
        return torch.cat([kept[uuid] for uuid in options["uuids"]])

    patched = apply_bridge(host, model, bridge, REFERENCE)
    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "cache", cache)
    found = sample(host, dual(host, patched, 1.5, 3.0), steps=2)

    # With the same outputs at both steps, two steps lead where one does.
    bridged = apply_bridge(host, model, bridge, REFERENCE)
    both, seen, neither = alone(host, bridged, True), alone(host, bridged, False), alone(host, model, False)
    close(found, neither + 1.5 * (seen - neither) + 3.0 * (both - seen))


def test_easycache_keeps_rows_apart(host: Host, model: Any, bridge: Any, monkeypatch: Any) -> None:
    """Protects: the host's EasyCache skips the same steps with the same outputs whether rows come in one
    batch or one by one, and without a threshold changes nothing.
    """
    bridged = apply_bridge(host, model, bridge, REFERENCE)

    def run(threshold: float) -> torch.Tensor:
        (cached,) = host.execute("EasyCache", model=bridged, reuse_threshold=threshold, start_percent=0.0)
        return sample(host, dual(host, cached, 1.5, 3.0), steps=8)

    plain = sample(host, dual(host, bridged, 1.5, 3.0), steps=8)
    assert torch.equal(run(0.0), plain)
    together = run(0.5)
    assert not torch.allclose(together, plain, atol=1e-3 * float(plain.std()))  # it did skip steps
    monkeypatch.setattr(type(model), "get_free_memory", lambda *_: 0)
    close(run(0.5), together)


def test_a_batch_function_gets_pairs(host: Host, model: Any, bridge: Any) -> None:
    """Protects: a node that computes the batch itself is given two conditionings, as in a stock run, and
    what it returns is used for every row.
    """

    def function(args: dict[str, Any]) -> list[torch.Tensor]:
        positive, negative = args["conds"]
        found = comfy.samplers.calc_cond_batch(
            args["model"], [positive, negative], args["input"], args["sigma"], args["model_options"]
        )
        return [found[0], 0.5 * found[1]]

    bridged = apply_bridge(host, model, bridge, REFERENCE)
    start = sample(host, model, steps=1, cfg=1.0) * 0  # a latent of noise alone
    halved = bridged.clone()
    halved.set_model_sampler_calc_cond_batch_function(function)
    both, seen, neither = alone(host, bridged, True), alone(host, bridged, False), alone(host, model, False)
    close(
        sample(host, dual(host, halved, 1.5, 3.0), steps=1),
        0.5 * (neither + 1.5 * (seen - neither)) + 3.0 * (both - 0.5 * seen) + start,
    )


def test_wrappers_on_both_sides_run(host: Host, model: Any, bridge: Any) -> None:
    """Protects: PREDICT_NOISE wrappers of nodes before and after Dual Guidance both run, from the outside
    in, and what the inner one returns is used.
    """
    order: list[str] = []

    def wrapper(name: str, gain: float) -> Callable:
        def wrap(executor: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
            order.append(name)
            return gain * executor(*args, **kwargs)

        return wrap

    bridged = apply_bridge(host, model, bridge, REFERENCE)
    plain = sample(host, dual(host, bridged, 1.5, 3.0), steps=1)
    before = bridged.clone()
    before.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "before", wrapper("before", 3.0))
    which = dual(host, before, 1.5, 3.0)
    which.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "after", wrapper("after", 0.5))
    close(sample(host, which, steps=1), 1.5 * plain)
    assert order == ["before", "after"]


def test_lazycache_on_either_side(host: Host, model: Any) -> None:
    """Protects: the host's LazyCache skips the same steps before and after Dual Guidance."""
    runs = []
    for order in (("guidance", "cache"), ("cache", "guidance")):
        which = model
        for name in order:
            if name == "guidance":
                which = dual(host, which, 1.5, 3.0)
            else:
                (which,) = host.execute("LazyCache", model=which, reuse_threshold=0.5, start_percent=0.0)
        with counted(model) as calls:
            runs.append(sample(host, which, steps=8))
        assert len(calls.rows) < 8
    assert torch.equal(*runs)


def test_guiders_that_predict_in_their_own_way_are_refused(host: Host, model: Any) -> None:
    """Protects: a guider whose own prediction would be lost is refused by name; others are served."""
    which = dual(host, model, 1.5, 3.0)
    positive, negative = small_models.conditioning(EDIT), small_models.conditioning(NOTHING)
    (double,) = host.execute(
        "DualModelGuider",
        model=which,
        model_negative=small_models.small_unet(1),
        positive=positive,
        negative=negative,
        cfg=3.0,
    )
    with pytest.raises(
        ValueError, match=r"Dual Guidance .for KSampler.: the guider Guider_DualModel has its own"
    ):
        guided(host, double)

    class Scheduled(comfy.samplers.CFGGuider):
        """Another cfg at each step."""

        def predict_noise(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            self.cfg += 1.0
            return super().predict_noise(*args, **kwargs)

    class Named(comfy.samplers.CFGGuider):
        """A guider with nothing of its own."""

    for kind in (Scheduled, Named):
        guider = kind(which)
        guider.set_conds(positive, negative)
        if kind is Scheduled:
            with pytest.raises(ValueError, match=r"the guider Scheduled has its own prediction"):
                guided(host, guider)
        else:
            close(guided(host, guider), sample(host, which, positive, negative))


@pytest.mark.parametrize("text", [4.0, 7.3, 1.0])
def test_neutral_scales_are_the_stock_bits(host: Host, model: Any, bridge: Any, text: float) -> None:
    """Protects: image guidance 1 is the sampler's own guidance by text, bit for bit, with a bridge and
    without; without one so is the formula of the release.
    """
    bridged = apply_bridge(host, model, bridge, REFERENCE)
    for which in (model, bridged):
        assert torch.equal(sample(host, dual(host, which, 1.0, text)), sample(host, which, cfg=text))
    assert torch.equal(sample(host, dual(host, model, 2.0, text, "release")), sample(host, model, cfg=text))


@pytest.mark.skipif(device().type != "cpu", reason="torch refuses a card by two names")
def test_two_devices(host: Host, model: Any) -> None:
    """Protects: without a bridge, rows that the host spreads over devices keep their meaning (two names of
    one device stand for them).
    """
    which = dual(host, adapted(model), 1.5, 3.0)
    expected = sample(host, which)

    def spread(executor: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        guider = executor.class_obj
        guider.model_options["multigpu_clones"] = {
            torch.device(device().type): guider.model_patcher,
            torch.device(device().type, 0): guider.model_patcher,
        }
        return executor(*args, **kwargs)

    which.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "devices", spread)
    with counted(model) as calls:
        close(sample(host, which), expected)
    assert calls.rows == [1] * 2 * bridge_edit.STEPS

"""A run with a bridge: what is read when, in which rows it acts, what it asks the host for, and its ends."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import bridge_edit
import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import pytest
import small_models
import torch
from bridge_edit import apply_bridge, counted, random_bridge, sample
from closeness import same
from host import Host
from torch.utils._pytree import tree_leaves

REFERENCE = small_models.latent(9)
pytestmark = pytest.mark.usefixtures("memory_mode")


@pytest.fixture(scope="module")
def model(memory_mode: str) -> Any:
    """A random UNet."""
    return small_models.small_unet()


@pytest.fixture(scope="module")
def bridge(host: Host, model: Any) -> Any:
    """A random bridge for it."""
    return random_bridge(host, model)


def test_reference_is_read_once(host: Host, model: Any, bridge: Any) -> None:
    """Protects: N steps cost N calls of the UNet and one more, on the reference alone, at timestep 0; with
    nothing to do none is read.
    """
    with counted(model) as calls:
        sample(host, apply_bridge(host, model, bridge, REFERENCE), steps=5)
    assert calls.rows == [1, 2, 2, 2, 2, 2]
    assert calls.timesteps[0] == 0
    assert calls.timesteps[1] == 999
    for inputs in ({"strength": 0.0}, {"mask": torch.zeros(1, 128, 128)}):
        with counted(model) as calls:
            sample(host, apply_bridge(host, model, bridge, REFERENCE, **inputs))
        assert calls.rows == [2] * bridge_edit.STEPS


def test_outside_its_range_it_is_bit_identical(host: Host, model: Any, bridge: Any) -> None:
    """Protects: a step outside start and end gives the bits of the unpatched model, inside it does not."""
    found = {}
    for name, inputs in (("late", {"start_percent": 0.3}), ("early", {"end_percent": 0.3}), ("whole", {})):
        denoised: list[torch.Tensor] = []
        patched = apply_bridge(host, model, bridge, REFERENCE, **inputs)
        callback = _collect(denoised)
        _sample_raw(patched, callback)
        found[name] = denoised
    plain: list[torch.Tensor] = []
    _sample_raw(model, _collect(plain))
    assert torch.equal(found["late"][0], plain[0])
    assert not torch.equal(found["late"][-1], plain[-1])
    assert torch.equal(found["early"][0], found["whole"][0])
    assert not torch.equal(found["early"][-1], found["whole"][-1])


def test_a_new_bridge_changes_nothing(host: Host, model: Any) -> None:
    """Protects: a bridge fresh from its node, with the fusion linear, is neutral; it is used all the same."""
    (fresh,) = host.execute("DescEditNewBridge", model=model, rank=4, alpha=4.0)
    with counted(model) as calls:
        found = sample(host, apply_bridge(host, model, fresh, REFERENCE))
    assert torch.equal(found, sample(host, model))
    assert calls.rows[0] == 1


def test_each_image_has_its_reference(host: Host, model: Any, bridge: Any) -> None:
    """Protects: n references for n images are paired in order, in the conditional and unconditional rows."""
    references = small_models.latent(9, batch=3)
    latent = torch.zeros(3, 4, 16, 16)
    together = sample(host, apply_bridge(host, model, bridge, references), latent=latent)
    for image in range(3):
        one = apply_bridge(host, model, bridge, references[image : image + 1])
        assert same(sample(host, one, latent=latent)[image], together[image])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(host: Host, dtype: torch.dtype) -> None:
    """Protects: a bridge of another precision than the model's is cast to what the model computes in."""
    model = small_models.small_unet(dtype=dtype)
    bridge = random_bridge(host, model)
    expected = sample(host, apply_bridge(host, model, bridge, REFERENCE))
    bridge.model.to(dtype)
    found = sample(host, apply_bridge(host, model, bridge, REFERENCE))
    assert float((found - expected).abs().max()) < 0.05 * float(expected.std())
    assert not torch.equal(found, sample(host, model))


def test_stock_dual_cfg(host: Host, model: Any, bridge: Any) -> None:
    """Protects: the stock DualCFGGuider, which numbers its conditionings the other way round, gets the bridge
    in all its rows.
    """
    conds = [small_models.conditioning(seed) for seed in (2, 6, 4)]
    patched = apply_bridge(host, model, bridge, REFERENCE)
    (guider,) = host.execute(
        "DualCFGGuider",
        model=patched,
        cond1=conds[0],
        cond2=conds[1],
        negative=conds[2],
        cfg_conds=2.0,
        cfg_cond2_negative=3.0,
    )
    with counted(model) as calls:
        found = bridge_edit.guided(host, guider, steps=1)
    assert calls.rows == [1, 3]
    first, second, third = (sample(host, patched, cond, conds[2], cfg=1.0, steps=1) for cond in conds)
    assert same(found, third + 3.0 * (second - third) + 2.0 * (first - second))


def test_without_source_the_negative_is_read(host: Host, model: Any, bridge: Any) -> None:
    """Protects: with no source description the reference is read with the sampler's negative one, and a
    sampling that has none says what to connect.
    """
    negative = small_models.conditioning(4)
    wired = apply_bridge(host, model, bridge, REFERENCE, source=negative)
    bare = apply_bridge(host, model, bridge, REFERENCE, source=None)
    assert torch.equal(sample(host, bare, negative=negative), sample(host, wired, negative=negative))
    (guider,) = host.execute("BasicGuider", model=bare, conditioning=negative)
    with pytest.raises(ValueError, match=r"Apply Attention Bridge: source is not connected"):
        bridge_edit.guided(host, guider)


def _held(run: Any) -> list[torch.Tensor]:
    """The tensors that a run keeps."""
    return [leaf for leaf in tree_leaves([vars(run), vars(run.cache)]) if isinstance(leaf, torch.Tensor)]


class _Watched:
    """Weak references to what a run keeps, taken in the middle of it, and how many bytes that is."""

    def __init__(self, model: Any, then: Any = None) -> None:
        self.model, self.then, self.kept, self.bytes = model, then, [], 0
        self._handle = model.model.diffusion_model.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, _: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        run = kwargs["transformer_options"].get("descriptive_edit.bridge")
        if run is not None:
            held = _held(run)
            self.kept += map(weakref.ref, [run, *held])
            storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in held}
            self.bytes = max(self.bytes, sum(storages.values()))
            if self.then is not None:
                self.then()

    def close(self) -> list[Any]:
        """What is still alive."""
        self._handle.remove()
        gc.collect()
        return [item() for item in self.kept if item() is not None]


def _fail() -> None:
    raise RuntimeError("in the middle")


@pytest.mark.parametrize("end", ["whole", "interrupt", "error"])
def test_the_cache_is_freed(host: Host, model: Any, bridge: Any, end: str) -> None:
    """Protects: nothing that a run keeps outlives it, however it ends; the next run gives the same bits."""
    references, latent = small_models.latent(9, batch=2), torch.zeros(2, 4, 16, 16)
    patched = apply_bridge(host, model, bridge, references, mask=bridge_edit.half_mask())
    expected = sample(host, patched, latent=latent)
    interrupt = comfy.model_management.interrupt_current_processing
    then = {"whole": None, "interrupt": interrupt, "error": _fail}[end]
    watched = _Watched(model, then)
    stopped = False
    try:
        sample(host, patched, latent=latent)
    except RuntimeError as error:
        stopped = "in the middle" in str(error)
    except comfy.model_management.InterruptProcessingException:
        stopped = True
    alive = watched.close()
    assert stopped == (end != "whole")
    assert len(watched.kept) > bridge_edit.LAYERS
    assert alive == []
    assert torch.equal(sample(host, patched, latent=latent), expected)


@pytest.mark.parametrize(
    ("direction", "images", "fusion"),
    [("edit_queries", 1, "linear"), ("edit_queries", 3, "replace"), ("reference_queries", 3, "linear")],
)
def test_memory_is_asked_for(
    host: Host, model: Any, monkeypatch: pytest.MonkeyPatch, direction: str, images: int, fusion: str
) -> None:
    """Protects: the host's memory estimate grows by at least what a run keeps, and by no more than half as
    much again; the bridge is one of the models that it loads.
    """
    asked: list[tuple[float, list[str]]] = []
    real = comfy.model_management.load_models_gpu

    def load(models: Any, *args: Any, minimum_memory_required: float = 0, **kwargs: Any) -> Any:
        asked.append((minimum_memory_required, [type(entry.model).__name__ for entry in models]))
        return real(models, *args, minimum_memory_required=minimum_memory_required, **kwargs)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", load)
    monkeypatch.setattr(model.model, "memory_required", lambda shape, **_: 1000 * shape[0])
    bridge = random_bridge(host, model, rank=8, direction=direction, fusion=fusion)
    patched = apply_bridge(host, model, bridge, small_models.latent(9, batch=images))
    watched = _Watched(model)
    for which in (model, patched):
        sample(host, which, latent=torch.zeros(images, 4, 16, 16))
    watched.close()
    (plain, _), (bridged, loaded) = asked
    assert watched.bytes <= bridged - plain <= 1.5 * watched.bytes + 1000
    assert "AttentionBridge" in loaded


def _collect(denoised: list[torch.Tensor]) -> Any:
    def callback(step: int, x0: torch.Tensor, x: torch.Tensor, total: int) -> None:
        denoised.append(x0.clone())

    return callback


def _sample_raw(model: Any, callback: Any) -> None:
    """The host's sampling with a callback, which nodes do not offer."""
    import comfy.sample

    latent = torch.zeros(1, 4, 16, 16)
    comfy.sample.sample(
        model,
        small_models.latent(3),
        bridge_edit.STEPS,
        3.0,
        "euler",
        "normal",
        small_models.conditioning(2),
        small_models.conditioning(4),
        latent,
        callback=callback,
        disable_pbar=True,
        seed=5,
    )

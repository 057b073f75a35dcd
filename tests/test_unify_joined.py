"""UnifyEdit's rows in one forward and one backward pass: the same gradients, and what other nodes see."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import other_nodes
import pytest
import small_models
import torch
from host import Host, device
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from unify_edit import Edit, FakeControl, box_mask

UNETS = ("SD1.5", "SDXL")
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def model() -> Any:
    """A random UNet with inference-tensor weights."""
    return small_models.small_unet()


@pytest.fixture
def rows(host: Host, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that makes the sampler join rows, or not."""
    memory = host.pack_module("patches.unify.memory")

    def choose(joined: bool) -> None:
        monkeypatch.setattr(memory, "few_operations", lambda *_: joined)

    return choose


def both(edit: Edit, rows: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Latent and losses of an edit, with rows apart and joined."""
    found = []
    for joined in (False, True):
        rows(joined)
        found.append((edit.run(), edit.trace().values))
    return found


def check_same(edit: Edit, rows: Any) -> None:
    """Apart and joined give the same picture, losses and norms of gradients."""
    (latent, values), (joined, joined_values) = both(edit, rows)
    torch.testing.assert_close(joined, latent, rtol=0, atol=1e-5 * float(latent.std()) * 10)
    torch.testing.assert_close(joined_values, values, equal_nan=True, **CLOSE)


@pytest.mark.parametrize("kind", UNETS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_same_as_apart(host: Host, rows: Any, kind: str, checkpointing: bool) -> None:
    """Protects: rows that run together give the edit of rows that run by themselves, for several images with
    a mask, and with more than one gradient in a step.
    """
    edit = Edit(host, small_models.KINDS[kind](), steps=2, batch=2)
    edit.sampler_inputs = {"mask": box_mask(), "checkpointing": checkpointing, "inner_steps": 2}
    check_same(edit, rows)


@pytest.mark.parametrize("betas", [(1.0, 0.0), (0.0, 1.0)])
def test_one_loss(host: Host, model: Any, rows: Any, betas: tuple[float, float]) -> None:
    """Protects: the same where only one loss has a weight."""
    edit = Edit(host, model, steps=2)
    edit.sampler_inputs["balance"] = edit.balance(beta1=betas[0], beta2=betas[1])
    check_same(edit, rows)


@pytest.mark.parametrize("what", ["texts of two lengths", "a ControlNet", "virtual", "no memory", "a range"])
def test_what_does_not_join(
    host: Host, model: Any, rows: Any, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Protects: what cannot run together, or what the host splits, gives the same edit: descriptions of other
    lengths, a ControlNet, a virtual inversion, no memory for several rows, and a description with a range.
    """
    edit = Edit(host, model, steps=2, mode="virtual" if what == "virtual" else "ddim")
    if what == "texts of two lengths":
        edit.positive = small_models.conditioning(2, tokens=2 * small_models.TEXT_TOKENS)
    elif what == "a ControlNet":
        edit.positive[0][1]["control"] = FakeControl()
    elif what == "a range":
        edit.positive[0][1].update(start_percent=0.0, end_percent=1.0)
    elif what == "no memory":
        monkeypatch.setattr(
            comfy.model_management,
            "get_free_memory",
            lambda _=None, torch_free_too=False: (0, 0) if torch_free_too else 0,
        )
    check_same(edit, rows)


def test_windows_of_a_batch(host: Host, model: Any, rows: Any) -> None:
    """Protects: rows that run together are named as those apart where a node cuts the batch."""
    rows(True)
    edit = Edit(host, model, steps=1, batch=2)
    edit.model = other_nodes.windows(host, model, 1)
    message = r"UnifyEdit Sampler: .* 3 latents of 16x16 instead of 6 .*context windows.*Take that node out"
    with pytest.raises(ValueError, match=message):
        edit.run()


def test_other_nodes_see_a_stock_call(host: Host, model: Any, rows: Any) -> None:
    """Protects: in a joined call another node's wrapper and patch see chunks of rows as in a stock call, each
    with the edit's index 0 and a uuid that stays through the run, and the source's chunk is its latent.
    """
    rows(True)
    seen: list[Any] = []
    edit = Edit(host, model, steps=2, batch=2)

    def wrapper(apply_model: Any, given: dict[str, Any]) -> torch.Tensor:
        options = given["c"]["transformer_options"]
        seen.append((given["input"].detach().clone(), given["cond_or_uncond"], options))
        return apply_model(given["input"], given["timestep"], **given["c"])

    def patch(n: torch.Tensor, context: Any, value: Any, extra: dict[str, Any]) -> tuple:
        assert len(n) == 2 * len(extra["cond_or_uncond"]) == 2 * len(extra["uuids"])
        return n, context, value

    edit.model = model.clone()
    edit.model.set_model_unet_function_wrapper(wrapper)
    edit.model.set_model_attn1_patch(patch)
    edit.run()
    joined = [call for call in seen if len(call[0]) == 6]
    assert len(joined) == 2
    for step, (x, indices, options) in enumerate(joined):
        assert indices == options["cond_or_uncond"] == [0, 0, 0]
        assert len(set(options["uuids"])) == 3
        assert len(options["sigmas"]) == 2
        source = edit.inversion.trajectory[step].to(x)
        is_source = [torch.equal(part, source) for part in x.chunk(3)]
        assert sum(is_source) == (1 if step else 3)  # at first the target is the source
        targets = [part for part, own in zip(x.chunk(3), is_source, strict=True) if not own or step == 0]
        assert torch.equal(targets[0], targets[1])
    assert set(joined[0][2]["uuids"]) == set(joined[1][2]["uuids"])


@pytest.mark.parametrize("kind", UNETS)
def test_rows_have_gradients_of_their_own(host: Host, kind: str) -> None:
    """Protects: nothing in a network mixes rows: what the attention of one row depends on is its own latent
    alone, bit for bit.
    """
    recorder = host.pack_module("patches.attention.recorder").AttentionRecorder
    gradients = host.pack_module("patches.host.autograd").gradients
    options = host.pack_module("patches.host.autograd").differentiable_options
    model = small_models.loaded(small_models.KINDS[kind]())
    network = host.network(model)
    layers = tuple(network.layers.values())
    with gradients():
        x = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0)).to(device())
        x.requires_grad_()
        made = recorder(network, layers, layers, stop=True)
        unet, text = model.model.diffusion_model, small_models.conditioning(1, batch=3)[0]
        call = made.attach(options(model.model_options))["transformer_options"]
        more = {} if kind == "SD1.5" else {"y": torch.zeros(3, unet.label_emb[0][0].in_features).to(x)}
        times = torch.full((3,), 400.0, device=x.device)
        unet(x, times, context=text[0].to(x), transformer_options=call, **more)
        for row in range(3):
            total = sum(found.q[row].sum() for found in made.cross_attention.values())
            (gradient,) = torch.autograd.grad(total, x, retain_graph=True)
            reached = gradient.flatten(1).abs().amax(dim=1) > 0
            assert reached.tolist() == [number == row for number in range(3)]


def test_mixed_rows_are_refused(host: Host, model: Any, rows: Any) -> None:
    """Protects: a node that lets the rows of a call see each other is named as the cause, and does not give
    another edit in silence.
    """
    rows(True)

    def mix(out: torch.Tensor, extra: dict[str, Any]) -> torch.Tensor:
        return out + 0.1 * out.mean(dim=0, keepdim=True)

    edit = Edit(host, model, steps=1)
    edit.model = model.clone()
    edit.model.set_model_attn1_output_patch(mix)
    with pytest.raises(Exception, match=r"UnifyEdit Sampler: a node mixes the rows of a model call .* Take"):
        edit.run()


@pytest.mark.parametrize(("joined", "calls"), [(True, 2), (False, 4)])
def test_layers_are_computed_again_once(host: Host, model: Any, rows: Any, joined: bool, calls: int) -> None:
    """Protects: with checkpointing a layer of a joined step runs once forward and once again; apart it runs
    for the source, forward, and again for each loss.
    """
    rows(joined)
    edit = Edit(host, model, steps=1)
    edit.cfg = 1.0
    edit.sampler_inputs["checkpointing"] = True
    ran = []
    block = model.model.diffusion_model.middle_block[0]
    hook = block.register_forward_pre_hook(lambda *_: ran.append(1))
    try:
        edit.run()
    finally:
        hook.remove()
    assert len(ran) - 1 == calls  # one is the prediction's


class _Dispatched(TorchDispatchMode):
    """Counts assignments of memory (`set_`)."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket is torch.ops.aten.set_
        return func(*args, **(kwargs or {}))


def counted_sets(edit: Edit) -> list[int]:
    """Numbers of `set_` in each step of a run."""
    marks = []
    with _Dispatched() as found:
        sampler = edit.sampler()
        sample = sampler.sampler_function

        def stepped(*args: Any, callback: Any, **more: Any) -> Any:
            return sample(*args, callback=lambda _: marks.append(found.count), **more)

        sampler.sampler_function = stepped
        edit.run(sampler)
    return [after - before for before, after in zip([0, *marks], marks, strict=False)]


def test_aliases_are_made_once(host: Host, model: Any) -> None:
    """Protects: the weights' aliases for autograd are made in the first step and used in the others."""
    edit = Edit(host, model, steps=3)
    first, second, third = counted_sets(edit)
    weights = sum(1 for _ in model.model.diffusion_model.parameters())
    assert first > weights / 2
    assert second == third < weights / 10


def test_aliases_follow_the_weights(host: Host) -> None:
    """Protects: an alias is made anew where the host has put its weight elsewhere or into another tensor, and
    memory that no region used is let go.
    """
    autograd = host.pack_module("patches.host.autograd")
    with torch.inference_mode():
        weight = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    aliases = autograd.Aliases()

    def slope(weight: torch.Tensor) -> list[float]:
        with autograd.gradients(False, aliases):
            x = torch.ones(3, requires_grad=True)
            (found,) = torch.autograd.grad((x * weight).sum(), x)
        aliases.drop_unused()
        return found.tolist()

    assert slope(weight) == [1, 1, 1]
    with torch.inference_mode():
        weight.fill_(2.0)
        assert slope(weight) == [2, 2, 2]
        old = weight.data
        weight.data = torch.full((3,), 3.0)
        old.fill_(torch.nan)
        assert slope(weight) == [3, 3, 3]
        weight = torch.nn.Parameter(torch.full((3,), 4.0), requires_grad=False)
        assert slope(weight) == [4, 4, 4]
    storage = torch.multiprocessing.reductions.StorageWeakRef(weight.untyped_storage())
    del weight, old
    assert not storage.expired()
    for _ in range(2):
        aliases.drop_unused()
    assert storage.expired()


class _Waiting(TorchFunctionMode):
    """Notes calls from the pack's own code, while it is active, that make a GPU wait for Python."""

    NAMES = (
        "item",
        "tolist",
        "cpu",
        "numpy",
        "__bool__",
        "__float__",
        "__int__",
        "__index__",
        "nonzero",
        "to",
    )

    def __init__(self, pack: str) -> None:
        super().__init__()
        self._pack = pack
        self.active, self.found = False, []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self.active and name in self.NAMES and (name != "to" or self._moves(args[1:], kwargs)):
            frame: Any = sys._getframe(1)
            while frame.f_globals["__name__"].endswith("patches.host.autograd"):  # which passes calls on
                frame = frame.f_back
            if frame.f_globals["__name__"].startswith(f"{self._pack}.patches."):
                self.found.append((frame.f_globals["__name__"], frame.f_lineno, name))
        return func(*args, **kwargs)

    @staticmethod
    def _moves(args: Any, kwargs: Any) -> bool:
        return any(isinstance(value, str | torch.device) for value in (*args, *kwargs.values()))


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("mode", ["ddim", "virtual"])
def test_nothing_waits_in_a_step(host: Host, model: Any, rows: Any, joined: bool, mode: str) -> None:
    """Protects: between the first step's start and the last one's end the pack's code reads no tensor's value
    and copies none to or from the device.
    """
    rows(joined)
    edit = Edit(host, model, steps=3, mode=mode)
    edit.sampler_inputs = {"mask": box_mask(), "alignment": "spatial_ratio"}
    sampler, module = edit.sampler(), host.pack_module("patches.unify.sampler")
    waiting, trange = _Waiting(host.pack.__name__), module.model_trange

    def steps(*args: Any, **kwargs: Any) -> Any:
        waiting.active = True
        yield from trange(*args, **kwargs)
        waiting.active = False

    with pytest.MonkeyPatch.context() as patch, waiting:
        patch.setattr(module, "model_trange", steps)
        edit.run(sampler)
    assert waiting.found == []


@pytest.mark.parametrize("side", [32, 64, 96])
def test_operations_of_a_row(host: Host, side: int) -> None:
    """Protects: the estimate of a row's arithmetic is SD1.5's, counted operation by operation, to a
    quarter."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from comfy.ops import disable_weight_init
    from torch.utils.flop_counter import FlopCounterMode

    pack = SimpleNamespace(
        memory=host.pack_module("patches.unify.memory"), layers=host.pack_module("patches.attention.layers")
    )
    tree = host.pack_module("lab.bench.random_sd15").UNET
    unet = UNetModel(**tree, device="meta", operations=disable_weight_init)
    network = host.pack_module("patches.attention.networks").network_of(unet)
    words = pack.layers.word_layers(network.layers.values(), side, side, 16)
    found = pack.memory.row_operations(network, ((), words), (1, 4, side, side))
    recorder = host.pack_module("patches.attention.recorder").AttentionRecorder(network, (), words, stop=True)
    attend = host.pack_module("lab.bench.measuring").torch_attention
    options = recorder.attach({"transformer_options": {"optimized_attention_override": attend}})
    x, text = torch.empty(1, 4, side, side, device="meta"), torch.empty(1, 77, 768, device="meta")
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        times = torch.zeros(1, device="meta")
        unet(x, times, context=text, transformer_options=options["transformer_options"])
    assert 0.75 < found / counter.get_total_flops() < 1.25

"""A gradient of attention has the same bits each time: on a card torch's kernels must be asked for that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from host import Host

_SETTING = torch.get_deterministic_debug_mode  # 0, or 2 where torch adds up in a fixed order or refuses


class _Noting(torch.autograd.Function):
    """The identity; its derivative notes torch's setting."""

    seen: list[int] = []  # noqa: RUF012

    @staticmethod
    def forward(_: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        _Noting.seen.append(_SETTING())
        return grad_outputs[0]


@pytest.fixture
def gradients(host: Host) -> Any:
    """The context that UnifyEdit and training take derivatives in."""
    return host.pack_module("patches.host.autograd").gradients


@pytest.mark.parametrize("width", [8, 5])
def test_only_attention(gradients: Any, width: int) -> None:
    """Protects: torch is told to use a fixed order for the derivative of attention and of nothing else, since
    functions without one refuse to run then; and the setting is as before afterwards.
    """
    _Noting.seen.clear()
    inside: list[int] = []
    before = _SETTING()
    with gradients():
        x = torch.randn(1, 2, 8, width, requires_grad=True)
        noted = _Noting.apply(x)
        out = F.scaled_dot_product_attention(noted, noted, noted)
        assert out.grad_fn is not None
        out.grad_fn.register_prehook(lambda *_: inside.append(_SETTING()))
        torch.autograd.grad(_Noting.apply(out).sum(), x)
        assert _SETTING() == before
    assert inside == [2]
    assert _Noting.seen == [before, before]


def test_after_an_error(gradients: Any) -> None:
    """Protects: an error in attention's derivative, such as memory that runs out, leaves torch's setting and
    that of convolutions as they were.
    """

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    def differentiate() -> None:
        with gradients():
            assert torch.backends.cudnn.deterministic
            x = torch.randn(1, 2, 8, 8, requires_grad=True)
            out = F.scaled_dot_product_attention(x, x, x)
            assert out.grad_fn is not None
            out.grad_fn.register_prehook(fail)
            torch.autograd.grad(out.sum(), x)

    before = _SETTING(), torch.backends.cudnn.deterministic
    with pytest.raises(torch.OutOfMemoryError):
        differentiate()
    assert (_SETTING(), torch.backends.cudnn.deterministic) == before

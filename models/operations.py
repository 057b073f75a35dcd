"""The host's layers, with weights from the start.

With dynamic VRAM, the default on NVIDIA cards, the host's Linear and Embedding have no weights until a state
dict is loaded. They ignore the requested dtype and device, and accept a weight of any shape. The host skips
this for layers with their own loader (comfy/ops.py), so these layers have one: torch's.
"""

from __future__ import annotations

from typing import Any

import comfy.ops
import torch


class _TorchLoader(torch.nn.Module):
    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)


class manual_cast(comfy.ops.manual_cast):
    """Layers that compute in the dtype and on the device of their input."""

    class Linear(_TorchLoader, comfy.ops.manual_cast.Linear):
        """[..., in_features] -> [..., out_features]."""

    class Embedding(_TorchLoader, comfy.ops.manual_cast.Embedding):
        """[...] of int -> [..., embedding_dim]."""


class disable_weight_init(comfy.ops.disable_weight_init):
    """Layers that compute in their own dtype, on their own device."""

    class Linear(_TorchLoader, comfy.ops.disable_weight_init.Linear):
        """[..., in_features] -> [..., out_features]."""

    class Embedding(_TorchLoader, comfy.ops.disable_weight_init.Embedding):
        """[...] of int -> [..., embedding_dim]."""

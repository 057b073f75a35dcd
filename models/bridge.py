"""The attention bridge's learned parameters (DescriptiveEdit, arXiv 2508.20505).

Each layer has LoRA updates of the self-attention's q, k, v and output projections, and a linear map F that
adds the result to the image's hidden states. The frozen projections themselves stay in the host's network. In
a DiT the updates act on the joint attention's q, k, v and result instead, and F before the output projection.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch

from .operations import manual_cast

DIRECTIONS = ("edit_queries", "reference_queries")
FUSIONS = ("linear", "add", "replace")
PROJECTIONS = ("q", "k", "v", "out")
# A fuse rank that is chosen by the base: 0 as long as the file stays below _LARGE bytes in half precision.
AUTOMATIC = -1
_LARGE, _FUSE_RANK = 300_000_000, 256
_KEY = re.compile(r"(input|middle|output|[a-z]+_block)\.\d+\.\d+")


def _described(default: Any, description: str) -> Any:
    """A field whose description a training configuration prints."""
    return field(default=default, metadata={"description": description})


@dataclass(frozen=True)
class BridgeOptions:
    """The options of a bridge. Raises ValueError for invalid values."""

    rank: int = _described(64, "Rank of the LoRA updates, from 1.")
    alpha: float = _described(64.0, "The LoRA updates are scaled by alpha / rank. Above 0.")
    direction: str = _described(
        "reference_queries",
        "edit_queries: Q from the image being denoised, K and V from the reference, as in the authors' "
        "figure and code. reference_queries: the other way round, which learned far faster "
        "(docs/bridge_study.md).",
    )
    fusion: str = _described(
        "linear",
        "How Z' joins the self-attention's output Z. linear: Z + F Z', with a learned F that starts at zero. "
        "add: Z + Z'. replace: Z'.",
    )
    reference_self_bridge: bool = _described(
        False,
        "Whether the reference's own rows pass the bridge too, attending to themselves, as in the authors' "
        "code.",
    )
    fuse_rank: int = _described(
        AUTOMATIC,
        "Rank of F. 0: a full matrix. -1: 0 as long as the file stays below 300 MB in half precision, else "
        "256.",
    )

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("direction", self.direction, DIRECTIONS),
            ("fusion", self.fusion, FUSIONS),
        ):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r} but must be one of {', '.join(allowed)}")
        if self.fuse_rank < AUTOMATIC:
            raise ValueError(f"fuse_rank is {self.fuse_rank} but must be -1 (automatic), 0 (full) or a rank")
        if self.rank < 1 or not self.alpha > 0:
            raise ValueError(
                f"rank is {self.rank} and alpha {self.alpha}, but rank must be 1 or more and alpha above 0"
            )


@dataclass(frozen=True)
class _Base:
    base: str
    widths: Mapping[str, int]


@dataclass(frozen=True)
class BridgeSettings(BridgeOptions, _Base):
    """A bridge without its weights: its base, then the options.

    base: the host's name of the bridge's model family, such as `SD15`.
    widths: channels of a token at every layer, by the layer's key, such as `output.3.0`.
    fuse_rank: what an automatic one comes to; 0 for a fusion without F.

    Raises ValueError for invalid values.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.widths:
            raise ValueError("a bridge needs at least one layer")
        for key in self.widths:
            if not _KEY.fullmatch(key):
                raise ValueError(f"a layer is called {key!r} but must be called as in output.3.0")
        if self.fusion != "linear" and self.fuse_rank > 0:
            raise ValueError(f"fuse_rank is {self.fuse_rank}, but the fusion {self.fusion} has no F")
        if self.fuse_rank == AUTOMATIC:
            object.__setattr__(self, "fuse_rank", 0)  # as which its size is asked for
            large = self.fusion == "linear" and 2 * self.parameters() > _LARGE
            object.__setattr__(self, "fuse_rank", _FUSE_RANK if large else 0)

    @property
    def joint(self) -> bool:
        """Whether the layers are joint attentions of a DiT."""
        return any("_block." in key for key in self.widths)

    @property
    def projections(self) -> tuple[str, ...]:
        """What has a LoRA update. In a DiT none of the result where F is learned, which F covers."""
        return PROJECTIONS[:3] if self.joint and self.fusion == "linear" else PROJECTIONS

    def parameters(self) -> int:
        """Number of learned parameters."""
        return sum(
            len(self.projections) * 2 * width * self.rank
            + (self.fusion == "linear") * (2 * width * self.fuse_rank or width * width)
            for width in self.widths.values()
        )

    def shape(self) -> str:
        """One line about the base's shape, for messages."""
        counts: dict[int, int] = {}
        for width in self.widths.values():
            counts[width] = counts.get(width, 0) + 1
        layers = ", ".join(f"{count} of width {width}" for width, count in sorted(counts.items()))
        return f"{self.base} with {len(self.widths)} layers ({layers})"


class LowRank(torch.nn.Module):
    """A map of low rank: x -> scale up(down(x)), with `width` input and output channels.

    scale: of a LoRA update alpha / rank.
    """

    def __init__(self, width: int, rank: int, scale: float = 1.0, **placed: Any) -> None:
        super().__init__()
        self.down = manual_cast.Linear(width, rank, bias=False, **placed)
        self.up = manual_cast.Linear(rank, width, bias=False, **placed)
        self.scale = scale


class LayerBridge(torch.nn.Module):
    """One layer's parameters: `q`, `k`, `v`, `out` and, for the fusion `linear`, `fuse`, which is F. There is
    no `out` where F covers it.
    """

    q: LowRank
    k: LowRank
    v: LowRank
    out: LowRank | None
    fuse: torch.nn.Module | None

    def __init__(self, width: int, settings: BridgeSettings, **placed: Any) -> None:
        super().__init__()
        for name in PROJECTIONS:
            update = LowRank(width, settings.rank, settings.alpha / settings.rank, **placed)
            self.add_module(name, update if name in settings.projections else None)
        self.fuse = None
        if settings.fusion == "linear" and settings.fuse_rank:
            self.fuse = LowRank(width, settings.fuse_rank, **placed)
        elif settings.fusion == "linear":
            self.fuse = manual_cast.Linear(width, width, bias=False, **placed)


class AttentionBridge(torch.nn.Module):
    """All layers. The names in the state dict are those of the bridge file plus `.weight`.

    The weights exist from the start, with this dtype and on this device, but are uninitialised: call `reset`
    or load a state dict.
    """

    def __init__(
        self,
        settings: BridgeSettings,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.settings = settings
        for key, width in settings.widths.items():
            parent: torch.nn.Module = self
            *outer, last = key.split(".")
            for name in outer:
                if name not in parent._modules:
                    parent.add_module(name, torch.nn.Module())
                parent = parent.get_submodule(name)
            parent.add_module(last, LayerBridge(width, settings, dtype=dtype, device=device))

    def layer(self, key: str) -> LayerBridge:
        """The parameters at a layer."""
        found = self.get_submodule(key)
        assert isinstance(found, LayerBridge)
        return found

    @torch.no_grad()
    def reset(self, seed: int = 0) -> AttentionBridge:
        """Initialise: `down` Gaussian with standard deviation 1 / its rank, everything else zero.

        With the fusion `linear` the bridge then changes nothing.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if name.endswith("down.weight"):
                start = torch.randn(weight.shape, generator=generator) / len(weight)
                weight.copy_(start)
            else:
                weight.zero_()
        return self


def manage(bridge: AttentionBridge) -> comfy.model_patcher.ModelPatcher:
    """The bridge under the host's model management: the value of ATTENTION_BRIDGE.

    Its weights get no gradient: the host copies them into buffers that it reuses, which must not become part
    of a graph. Training works on a copy.
    """
    management = comfy.model_management
    return comfy.model_patcher.CoreModelPatcher(
        bridge.requires_grad_(False),
        load_device=management.get_torch_device(),
        offload_device=management.unet_offload_device(),
    )


def new_bridge(settings: BridgeSettings, seed: int = 0) -> comfy.model_patcher.ModelPatcher:
    """An initialised bridge, in float32."""
    device = comfy.model_management.unet_offload_device()
    with torch.inference_mode(False):
        return manage(AttentionBridge(settings, torch.float32, device).reset(seed))

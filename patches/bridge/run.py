"""An attention bridge during one sampling: the reference is read once, and every call uses its features."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import comfy.sampler_helpers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.model_sampling import CONST
from comfy.patcher_extension import WrappersMP
from comfy.samplers import CFGGuider
from einops import rearrange
from kornia.geometry.transform import resize

from ...models.bridge import BridgeSettings
from ..attention.checks import COMPILED, check_fired, may_skip, refused_parts
from ..attention.layers import AttentionLayer
from ..attention.masks import check_mask, layer_masks
from ..attention.networks import network_of
from ..attention.recorder import WRAPPER_KEY
from ..host.conditions import model_conditions
from ..host.inputs import read_mask
from .core import DenoisePatches, Door, Features, ReferenceCache

KEY = "descriptive_edit.bridge"
# In transformer_options, by a guider: the uuids of the rows that do not see the reference.
BLIND = "descriptive_edit.blind_rows"
# What a launch costs besides its arithmetic, in multiply-adds that the device does meanwhile; and how many
# launches merging a layer's output needs once, and saves in each call.
_LAUNCH_CPU, _LAUNCH_CARD = 2.5e5, 1e8
_MERGE, _SAVED = 6, 3
# Of a conditioning, as the host has it: height, width, top and left; None for the whole latent.
Area = tuple[int, ...] | None


@dataclass(frozen=True, eq=False)
class BridgeSetup:
    """Inputs of Apply Attention Bridge.

    bridge: ATTENTION_BRIDGE.
    reference: [references, channels, height, width] as a VAE gives it.
    source: the source description's CONDITIONING; None uses the run's negative one.
    strength: factor of the bridge's output, any finite number; 1 as trained.
    start, end: fractions of the sampling, 0 to 1, between which it acts.
    mask: [1 or images, height, width], 0 to 1, where it acts; None for everywhere.
    joined: use all references for every image, joined along tokens, instead of one for each.

    Raises ValueError for an invalid strength, range, mask or source, and for references that are joined
    although the bridge's direction does not allow it.
    """

    bridge: ModelPatcher
    reference: torch.Tensor
    source: list[Any] | None = None
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    mask: torch.Tensor | None = None
    joined: bool = False

    def __post_init__(self) -> None:
        if self.mask is not None:
            object.__setattr__(self, "mask", read_mask("mask", self.mask))
        if not math.isfinite(self.strength):
            raise ValueError(f"strength is {self.strength} but must be a finite number")
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(
                f"start_percent is {self.start} and end_percent {self.end}, but they must rise within 0 to 1"
            )
        if self.source is not None and (
            len(self.source) != 1 or not {"area", "mask"}.isdisjoint(self.source[0][1])
        ):
            raise ValueError(
                f"source must be one description of the whole reference, but it has {len(self.source)} "
                "entries or an area or mask: wire a plain CLIPTextEncode"
            )
        if self.joined and self.settings.direction != "edit_queries":
            raise ValueError(
                f"several references can be joined only for a bridge with the direction edit_queries; "
                f"this one has {self.settings.direction}"
            )

    @property
    def settings(self) -> BridgeSettings:
        """The settings of the bridge."""
        return self.bridge.model.settings


class BridgeRun:
    """One sampling with a bridge. It is kept in the run's own `transformer_options`.

    guider: the host's, inside its `inner_sample`.
    noise: [images, channels, height, width].
    sigmas: the run's.
    door: context that is entered where an error is raised inside another node's call.

    Raises ValueError if references, mask or grid do not fit the sampled latent.
    """

    def __init__(
        self,
        setup: BridgeSetup,
        guider: CFGGuider,
        noise: torch.Tensor,
        sigmas: torch.Tensor,
        door: Door,
    ) -> None:
        model = guider.inner_model
        self.cache = ReferenceCache(setup.bridge.model, network_of(model.diffusion_model))
        self._setup, self._guider, self._door = setup, guider, door
        self._images, (self._height, self._width) = noise.shape[0], noise.shape[-2:]
        self._device, self._steps = noise.device, len(sigmas) - 1
        self._range: tuple[float, float] | None = None
        if (setup.start, setup.end) != (0.0, 1.0):
            to_sigma = model.model_sampling.percent_to_sigma
            self._range = to_sigma(setup.start), to_sigma(setup.end)
        self._hooked = any(entry.get("hooks") for conds in guider.conds.values() for entry in conds)
        self._areas: dict[Any, Area] = {}
        self._masks: dict[tuple, dict[str, torch.Tensor]] = {}
        self._rows: dict[tuple[int, ...], slice | torch.Tensor] = {}
        self._expanded: dict[tuple[int, str], Features] = {}
        self._due = self._fired = False
        if noise.ndim == 5 and noise.shape[2] > 1:
            raise ValueError(
                f"the latent has {noise.shape[2]} frames, but a bridge edits an image: sample a latent of one"
            )
        self._mask = self._latent_mask(setup.mask, model.latent_format.spacial_downscale_ratio)
        self._check_reference()

    def _latent_mask(self, mask: torch.Tensor | None, scale: int) -> torch.Tensor | None:
        if mask is None:
            return None
        check_mask(mask, self._images, self._height * scale, self._width * scale)
        mask = rearrange(mask.to(self._device), "b h w -> b 1 h w")
        return rearrange(resize(mask, (self._height, self._width), interpolation="area"), "b 1 h w -> b h w")

    def _check_reference(self) -> None:
        references, (height, width) = len(self._setup.reference), self._setup.reference.shape[-2:]
        if not self._setup.joined and references not in (1, self._images):
            raise ValueError(
                f"reference has {references} images but {self._images} are sampled: give one, or one "
                "for each, or choose to join them"
            )
        reason, network = "", self.cache.network
        if self._setup.settings.direction == "reference_queries":
            reason = "this bridge has the direction reference_queries"
        elif not network.any_reference_size:
            reason = f"this MODEL is a {network.name}, which cannot put a reference on other positions"
        if reason and (height, width) != (self._height, self._width):
            raise ValueError(
                f"{reason}, so that the reference must have the latent's size, "
                f"{self._width}x{self._height}, but it has {width}x{height}: scale the source image to the "
                "size that is sampled"
            )

    def read_reference(self) -> None:
        """The reference pass with the source description, through the host's loaded network, without other
        nodes' patches.
        """
        model = self._guider.inner_model
        reference = model.process_latent_in(self._setup.reference.to(self._device, torch.float32))
        conds = model_conditions(
            model,
            self.cache.network.source(self._source_entry()),
            reference,
            ("c_concat", "c_crossattn", *self.cache.network.conditions),
        )
        concat, text = conds.pop("c_concat", None), conds.pop("c_crossattn", None)
        timestep, x = _clean(model.model_sampling, reference)
        x = x.to(model.get_dtype_inference())
        self.cache.read(
            x if concat is None else torch.cat([x, concat], dim=1),
            self._reference_options(len(reference), (x.shape[-2], x.shape[-1])),
            joined=self._setup.joined,
            repaid=None if self._hooked else self._repaid,
            timesteps=timestep,
            context=text,
            **conds,
        )

    def _source_entry(self) -> dict[str, Any]:
        if self._setup.source is not None:
            return comfy.sampler_helpers.convert_cond(self._setup.source)[0]
        for entry in self._guider.original_conds.get("negative", ()):
            if "area" not in entry and "mask" not in entry:
                return entry
        raise ValueError(
            "source is not connected and the sampling has no negative conditioning for the whole "
            "image to take its place: connect the source description"
        )

    def _reference_options(self, count: int, size: tuple[int, int]) -> dict[str, Any]:
        own = self._guider.model_options["transformer_options"]
        kept = {name: own[name] for name in ("optimized_attention_override",) if name in own}
        return {
            **kept,
            **self.cache.network.positions(own, (self._height, self._width), size),
            "cond_or_uncond": [0],
            "uuids": [None],
            "sigmas": torch.zeros(count, device=self._device),
            "prefetch_dynamic_vbars": self._guider.model_patcher.is_dynamic(),
        }

    def _repaid(self, layer: AttentionLayer) -> bool:
        """Whether merging a layer's output saves at least twice what it costs, over the run.

        Counted are multiply-adds of one row for each image, and what launches cost besides.
        """
        settings, width = self._setup.settings, layer.width
        tokens = self._images * math.prod(layer.grid(self._height, self._width))
        launch = _LAUNCH_CPU if self._device.type == "cpu" else _LAUNCH_CARD
        fuse = (2 * settings.fuse_rank or width) if settings.fusion == "linear" else 0
        cost = width * width * (settings.rank + fuse) + _MERGE * launch
        saved = tokens * width * (2 * settings.rank + fuse) + _SAVED * launch
        return self._steps * saved >= 2 * cost

    def note_areas(self, conds: list[list[dict[str, Any]] | None]) -> None:
        """Store the area of each conditioning by its uuid, which the host's copies keep."""
        known = [entry for entries in conds for entry in entries or () if "area" in entry]
        self._areas = {entry["uuid"]: tuple(entry["area"]) for entry in known}

    def patches(self, options: dict[str, Any], x: torch.Tensor) -> DenoisePatches:
        """The bridge for one model call.

        options: its `transformer_options`.
        x: its latents.

        Every call gets patches, even if no row sees the reference, so that a compiled network always finds
        the same ones.
        Raises ValueError for a call on parts of the latent that the bridge cannot follow.
        """
        uuids, blind = options["uuids"], options.get(BLIND, ())
        chunks = [chunk for chunk, uuid in enumerate(uuids) if uuid not in blind]
        if not chunks or not self._active(options["sigmas"]):
            return DenoisePatches(self.cache, None, x, self.cache.features.__getitem__)
        areas = [self._areas.get(uuid) for uuid in uuids]
        moved = "context_window" in options  # the host's, which may hold any images in any order
        in_order = len(x) == len(areas) * self._images and not moved
        self._check_parts(x, areas, len(chunks), in_order)
        rows: slice | torch.Tensor = slice(0, len(x))
        masks, shifts, images = None, None, len(x)
        if in_order and any(areas):
            shifts = self._shifts([areas[chunk] for chunk in chunks], options, x.device)
        if in_order:
            rows, images = self._rows_of(chunks), len(chunks) * self._images
        if self._mask is not None:
            areas = [areas[chunk] for chunk in chunks] if in_order else [None]
            masks = self._layer_masks(self._mask, areas, self._images if in_order else 1, x)
        strength, features = self._setup.strength, partial(self._features, images)
        return DenoisePatches(self.cache, rows, x, features, strength, masks, shifts, self._door)

    def _shifts(self, areas: list[Area], options: dict[str, Any], device: torch.device) -> Any:
        """For every row of these chunks what moves it to its part of the latent, None in a UNet."""
        whole = self._height, self._width
        parts = [(*_size_of(area, whole), *(area[2:] if area else (0, 0))) for area in areas]
        rows = [part for part in parts for _ in range(self._images)]
        return self.cache.network.shifts(options, rows, whole, device)

    def _check_parts(self, x: torch.Tensor, areas: list[Area], seen: int, in_order: bool) -> None:
        """Raise ValueError if the bridge must know which image or position a row holds and cannot.

        Other nodes may call the model with tiles of the latent, or with some of its images in their own
        order.

        areas: for each conditioning of the call.
        seen: how many of these see the reference.
        in_order: whether the rows are in the host's order, every image for each conditioning.
        """
        whole, size = (self._height, self._width), tuple(x.shape[-2:])
        network = self.cache.network
        from_edit = self._setup.settings.direction == "edit_queries"
        if not from_edit and size != whole and any(areas):
            raise ValueError(
                f"a bridge with the direction reference_queries needs the grid of the whole image, "
                f"{whole[1]}x{whole[0]}, but a conditioning has an area of {size[1]}x{size[0]}: take the "
                "area away, or use a bridge with edit_queries"
            )
        reasons = []
        if any(size != _size_of(area, whole) for area in areas):
            reasons += ["it has a mask"] if self._mask is not None else []
            reasons += [] if from_edit else ["it has reference_queries"]
            reasons += [f"a {network.name} has positions"] if network.positional else []
        if not in_order:
            reasons += (
                [f"a {network.name} has positions in an area"] if network.positional and any(areas) else []
            )
            several = not self._setup.joined and len(self._setup.reference) > 1
            reasons += ["each image has its own reference"] if several else []
            reasons += ["some rows of dual guidance see no reference"] if seen < len(areas) else []
            if self._mask is not None and (len(self._mask) > 1 or any(areas)):
                reasons += ["it has a mask for each image or area"]
        if reasons:
            raise refused_parts(x, len(areas) * self._images, whole, " and ".join(reasons))

    def check_fired(self, patches: DenoisePatches, options: dict[str, Any]) -> None:
        """After a model call: raises ValueError if the bridge should have acted at a layer and did not.

        Not if another node's wrapper may have kept the network from running, as cached steps do, or a
        recorder of ours may have ended it.
        """
        if patches.rows is None:
            return
        self._due, self._fired = True, self._fired or bool(patches.fired)
        recorded = WRAPPER_KEY in options.get("wrappers", {}).get(WrappersMP.DIFFUSION_MODEL, {})
        if not recorded:
            check_fired("attn1", self.cache.network.layers.values(), patches.fired)
        if not patches.fired and not may_skip(options, KEY):
            raise ValueError(f"the bridge acted at no layer. {COMPILED}")

    def finish(self) -> None:
        """After the last step: raises ValueError if the bridge should have acted and did in no call."""
        if self._due and not self._fired:
            raise ValueError(
                f"the bridge acted at no layer in any step. Another node keeps the UNet from running: take "
                f"it out of the MODEL's chain. Or: {COMPILED}"
            )

    def _active(self, sigma: torch.Tensor) -> bool:
        """Whether the bridge acts at this sigma, by the host's rule for ControlNets."""
        return self._range is None or self._range[1] <= float(sigma[0]) <= self._range[0]

    def _rows_of(self, chunks: list[int]) -> slice | torch.Tensor:
        """The rows of these chunks; made once per run."""
        if (call := tuple(chunks)) not in self._rows:
            rows = [chunk * self._images + image for chunk in chunks for image in range(self._images)]
            together = rows[-1] - rows[0] == len(rows) - 1
            self._rows[call] = (
                slice(rows[0], rows[-1] + 1) if together else torch.tensor(rows, device=self._device)
            )
        return self._rows[call]

    def _features(self, rows: int, key: str) -> Features:
        """A layer's features for `rows` rows, those of the images over and over; expanded once per run."""
        if (rows, key) not in self._expanded:
            self._expanded[rows, key] = tuple(
                kept.expand(rows, -1, -1) if len(kept) in (1, rows) else kept.repeat(rows // len(kept), 1, 1)
                for kept in self.cache.features[key]
            )
        return self._expanded[rows, key]

    def _layer_masks(
        self, mask: torch.Tensor, areas: list[Area], images: int, x: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The mask at every layer for `images` rows of each of these areas, [rows, tokens, 1]; computed once
        per run.
        """
        height, width = x.shape[-2:]
        call = (tuple(areas), images, height, width)
        if call not in self._masks:
            parts = []
            for area in areas:
                *_, top, left = area or (0, 0)
                parts.append(mask[:, top : top + height, left : left + width].expand(images, -1, -1))
            layers = self.cache.network.layers.values()
            masks = layer_masks(torch.cat(parts), layers, height, width, x.device)
            self._masks[call] = {
                key: mask[..., None].to(self.cache.features[key][0].dtype) for key, mask in masks.items()
            }
        return self._masks[call]

    def close(self) -> None:
        """Free the run's memory."""
        self.cache.clear()
        self._mask, self._masks, self._rows, self._expanded = None, {}, {}, {}


def _clean(sampling: Any, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The timesteps, [references], and the network's input for a reference without noise.

    In a discrete schedule and in a flow timestep 0 is clean. If the timestep is another function of sigma
    (EDM), 0 is not, so the timestep of the lowest sigma is used.
    """
    sigma = sampling.sigma_min.to(reference).expand(len(reference))
    timestep = sampling.timestep(sigma)
    if isinstance(sampling, CONST) or not timestep.is_floating_point():
        return torch.zeros(len(reference), device=reference.device), reference
    return timestep.float(), sampling.calculate_input(sigma, reference)


def _size_of(area: Area, whole: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the host's crop for an area."""
    if area is None:
        return whole
    height, width, top, left = area
    return min(whole[0] - top, height), min(whole[1] - left, width)

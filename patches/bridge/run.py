"""An attention bridge during one sampling: the reference is read once, every call is fed from its bank."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from einops import rearrange
from kornia.geometry.transform import resize

from ...models.bridge import BridgeSettings
from ...models.sites import SiteKey
from ..attention.checks import COMPILED, check_fired, may_skip, refused_parts
from ..attention.masks import check_mask, site_masks
from ..attention.recorder import WRAPPER_KEY
from .core import Bank, Feeding, Matrix

KEY = "descriptive_edit.bridge"
# In transformer_options, by a guider: the uuids of the rows that do not see the reference.
BLIND = "descriptive_edit.blind_rows"


@dataclass(frozen=True, eq=False)
class BridgeSetup:
    """What a bridge is applied with.

    bridge: ATTENTION_BRIDGE. reference: [references, channels, height, width] as a VAE gives it. source: the
    source description's CONDITIONING; None takes the run's negative one. strength: of what the bridge adds,
    any finite number, 1 as trained. start, end: shares of the sampling, 0 to 1, between which it acts. mask:
    [1 or images, height, width], 0 to 1, where it acts; None for everywhere. joined: all references for every
    image, joined along tokens, instead of one for each.
    """

    bridge: Any
    reference: torch.Tensor
    source: list[Any] | None = None
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    mask: torch.Tensor | None = None
    joined: bool = False

    @property
    def settings(self) -> BridgeSettings:
        return self.bridge.model.settings


class BridgeRun:
    """One sampling with a bridge. It lives in the run's own `transformer_options`.

    guider: the host's, inside its `inner_sample`. noise: [images, channels, height, width]. sigmas: the
    run's. Raises ValueError, if references, mask or grid do not fit the sampled latent.
    """

    def __init__(self, setup: BridgeSetup, guider: Any, noise: torch.Tensor, sigmas: torch.Tensor) -> None:
        model = guider.inner_model
        self.bank = Bank(setup.bridge.model, model.diffusion_model)
        self._setup, self._guider = setup, guider
        self._images, (self._height, self._width) = noise.shape[0], noise.shape[-2:]
        self._device, self._steps = noise.device, len(sigmas) - 1
        self._range: tuple[float, float] | None = None
        if (setup.start, setup.end) != (0.0, 1.0):
            to_sigma = model.model_sampling.percent_to_sigma
            self._range = to_sigma(setup.start), to_sigma(setup.end)
        self._areas: dict[Any, tuple[int, ...]] = {}
        self._masks: dict[tuple, dict[SiteKey, torch.Tensor]] = {}
        self._due = self._fed = False
        self._mask = self._latent_mask(setup.mask, model.latent_format.spacial_downscale_ratio)
        self._check_reference()

    def _latent_mask(self, mask: torch.Tensor | None, scale: int) -> torch.Tensor | None:
        if mask is None:
            return None
        check_mask(mask, self._images, self._height * scale, self._width * scale)
        mask = rearrange(mask.to(self._device), "b h w -> b 1 h w")
        return rearrange(resize(mask, (self._height, self._width), interpolation="area"), "b 1 h w -> b h w")

    def _check_reference(self) -> None:
        references, _, height, width = self._setup.reference.shape
        if not self._setup.joined and references not in (1, self._images):
            raise ValueError(
                f"reference has {references} images but {self._images} are sampled: give one, or one "
                "for each, or choose to join them"
            )
        size = self._height, self._width
        if self.bank.settings.direction == "reference_queries" and (height, width) != size:
            raise ValueError(
                f"this bridge has the direction reference_queries, whose reference must have the "
                f"latent's size, {self._width}x{self._height}, but it has {width}x{height}: scale the source "
                "image to the size that is sampled"
            )

    def read_reference(self) -> None:
        """The reference pass with the source description, through the host's UNet as it is loaded, without
        other nodes' patches.
        """
        model = self._guider.inner_model
        reference = model.process_latent_in(self._setup.reference.to(self._device, torch.float32))
        (entry,) = comfy.samplers.encode_model_conds(
            model.extra_conds,
            [self._source_entry()],
            reference,
            self._device,
            "positive",
            latent_image=reference,
            denoise_mask=None,
        )
        dtype, count = model.get_dtype_inference(), len(reference)
        conds = {
            name: cond.process_cond(batch_size=count, area=None).cond.to(self._device, dtype)
            for name, cond in entry["model_conds"].items()
            if name in ("c_concat", "c_crossattn", "y")
        }
        concat = conds.get("c_concat")
        timestep, x = _clean(model.model_sampling, reference)
        x = x.to(dtype)
        self.bank.read(
            model.diffusion_model,
            x if concat is None else torch.cat([x, concat], dim=1),
            self._reference_options(count),
            joined=self._setup.joined,
            merge=self._merge,
            timesteps=timestep,
            context=conds.get("c_crossattn"),
            y=conds.get("y"),
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

    def _reference_options(self, count: int) -> dict[str, Any]:
        own = self._guider.model_options["transformer_options"]
        kept = {name: own[name] for name in ("optimized_attention_override",) if name in own}
        return {
            **kept,
            "cond_or_uncond": [0],
            "uuids": [None],
            "sigmas": torch.zeros(count, device=self._device),
            "prefetch_dynamic_vbars": self._guider.model_patcher.is_dynamic(),
        }

    def _merge(self, key: SiteKey, like: torch.Tensor) -> Matrix | None:
        """Fuse and output projection as one matrix and bias, from the host's own layer.

        Exact for the Linear fusion as long as the weights stay the same, so not under hooks, which change
        them between calls. Costs 4 width^3 and saves 2 width^2 a token, so it is done where the run's tokens
        repay it at least twice.
        """
        site, output, width = self.bank.bridge.site(key), self.bank.outputs[key], like.shape[-1]
        grid = next(s.grid(self._height, self._width) for s in self.bank.sites if s.key == key)
        hooked = any(entry.get("hooks") for conds in self._guider.conds.values() for entry in conds)
        if site.fuse is None or hooked or math.prod(grid) * self._steps < 4 * width:
            return None
        unit = torch.eye(width, dtype=like.dtype, device=like.device)
        constant = output(torch.zeros_like(unit[:1]))
        matrix = site.fuse(output(unit) - constant + site.out(unit))
        return matrix.mT.contiguous(), site.fuse(constant)[0]

    def note_areas(self, conds: list[list[dict[str, Any]] | None]) -> None:
        """Remember the area of each conditioning by its uuid, which the host's copies keep."""
        known = [entry for entries in conds for entry in entries or () if "area" in entry]
        self._areas = {entry["uuid"]: tuple(entry["area"]) for entry in known}

    def feeding(self, options: dict[str, Any], x: torch.Tensor) -> Feeding:
        """The bridge for one model call. options: its `transformer_options`. x: its latents.

        There are patches for every call, also where no row sees the reference, so that a compiled UNet
        always finds the same ones. Raises ValueError for a call on parts of the latent that the bridge cannot
        follow.
        """
        uuids, blind = options["uuids"], options.get(BLIND, ())
        chunks = [chunk for chunk, uuid in enumerate(uuids) if uuid not in blind]
        if not self._active(options["sigmas"]):
            chunks = []
        if not chunks:
            return Feeding(self.bank, None, x, lambda kept: kept)
        areas = [self._areas.get(uuid) for uuid in uuids]
        moved = "context_window" in options  # the host's, which may hold any images in any order
        in_order = len(x) == len(areas) * self._images and not moved
        self._check_parts(x, areas, len(chunks), in_order)
        rows: slice | torch.Tensor = slice(0, len(x))
        masks, answer = None, lambda kept: kept.expand(len(x), -1, -1)
        if in_order:
            rows, answer = self._rows(chunks, x), self._answer(len(chunks))
        if self._mask is not None:
            areas = [areas[chunk] for chunk in chunks] if in_order else [None]
            masks = self._site_masks(areas, self._images if in_order else 1, x)
        return Feeding(self.bank, rows, x, answer, self._setup.strength, masks)

    def _check_parts(
        self, x: torch.Tensor, areas: list[tuple[int, ...] | None], seen: int, in_order: bool
    ) -> None:
        """Other nodes may call the model with tiles of the latent, or with some of its images, in an order of
        their own: raise ValueError where it must be known what a row is, and is not.

        areas: for each conditioning of the call. seen: how many of these see the reference. in_order: whether
        the rows are, as the host makes them, every image for each conditioning.
        """
        whole, size = (self._height, self._width), tuple(x.shape[-2:])
        from_edit = self.bank.settings.direction == "edit_queries"
        if not from_edit and size != whole and any(areas):
            raise ValueError(
                f"a bridge with the direction reference_queries needs the picture's own grid, "
                f"{whole[1]}x{whole[0]}, but a conditioning has an area of {size[1]}x{size[0]}: take the "
                "area away, or use a bridge with edit_queries"
            )
        reasons = []
        if any(size != _size_of(area, whole) for area in areas):
            reasons += ["it has a mask"] if self._mask is not None else []
            reasons += [] if from_edit else ["it has reference_queries"]
        if not in_order:
            several = not self._setup.joined and len(self._setup.reference) > 1
            reasons += ["each image has a reference of its own"] if several else []
            reasons += ["some rows of dual guidance see no reference"] if seen < len(areas) else []
            if self._mask is not None and (len(self._mask) > 1 or any(areas)):
                reasons += ["it has a mask for each image or area"]
        if reasons:
            raise refused_parts(x, len(areas) * self._images, whole, " and ".join(reasons))

    def check_fired(self, feeding: Feeding, options: dict[str, Any]) -> None:
        """After a model call: raises ValueError if a layer that was to be fed was not, unless another node's
        wrapper may have kept the UNet from running, as cached steps do. A recorder of ours may have ended it.
        """
        if feeding.rows is None:
            return
        self._due, self._fed = True, self._fed or bool(feeding.fired)
        recorded = WRAPPER_KEY in options.get("wrappers", {}).get(WrappersMP.DIFFUSION_MODEL, {})
        if not recorded:
            check_fired("attn1", self.bank.sites, feeding.fired)
        if not feeding.fired and not may_skip(options, KEY):
            raise ValueError(f"no layer was fed. {COMPILED}")

    def finish(self) -> None:
        """After the last step: raises ValueError if no call was fed although some were to be."""
        if self._due and not self._fed:
            raise ValueError(
                f"no layer was fed in any step. Another node keeps the UNet from running: take it "
                f"out of the MODEL's chain. Or: {COMPILED}"
            )

    def _active(self, sigma: torch.Tensor) -> bool:
        """Whether the bridge acts at this noise level, by the host's rule for ControlNets."""
        return self._range is None or self._range[1] <= float(sigma[0]) <= self._range[0]

    def _rows(self, chunks: list[int], x: torch.Tensor) -> slice | torch.Tensor | None:
        if not chunks:
            return None
        if chunks[-1] - chunks[0] == len(chunks) - 1:
            return slice(chunks[0] * self._images, (chunks[-1] + 1) * self._images)
        rows = [chunk * self._images + image for chunk in chunks for image in range(self._images)]
        return torch.tensor(rows, device=x.device)

    def _answer(self, chunks: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """From a tensor of the bank to one for every row of `chunks` chunks."""
        rows = chunks * self._images
        return lambda kept: kept.expand(rows, -1, -1) if len(kept) == 1 else kept.repeat(chunks, 1, 1)

    def _site_masks(
        self, areas: list[tuple[int, ...] | None], images: int, x: torch.Tensor
    ) -> dict[SiteKey, torch.Tensor]:
        """The mask at every site for `images` rows of each of these areas, [rows, tokens, 1]; made once a
        run.
        """
        height, width = x.shape[-2:]
        call = (tuple(areas), images, height, width)
        if call not in self._masks:
            parts = []
            for area in areas:
                mask = self._mask
                if area is not None:
                    *_, top, left = area
                    mask = mask[:, top : top + height, left : left + width]
                parts.append(mask.expand(images, -1, -1))
            masks = site_masks(torch.cat(parts), self.bank.sites, height, width, x.device)
            found = {key: mask[..., None] for key, mask in masks.items()}
            self._masks[call] = found
        return self._masks[call]

    def close(self) -> None:
        """Free what the run kept."""
        self.bank.free()
        self._masks.clear()
        self._mask = None


def _clean(sampling: Any, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The timesteps, [references], and the network's input for a reference without noise.

    A discrete schedule counts its timesteps, and 0 is clean. Where the timestep is a function of the noise
    level (EDM), 0 is not, so the reference is taken as what the lowest level holds.
    """
    sigma = sampling.sigma_min.to(reference).expand(len(reference))
    timestep = sampling.timestep(sigma)
    if not timestep.is_floating_point():
        return torch.zeros(len(reference), device=reference.device), reference
    return timestep.float(), sampling.calculate_input(sigma, reference)


def _size_of(area: tuple[int, ...] | None, whole: tuple[int, int]) -> tuple[int, int]:
    """Height and width of what the host cuts out for an area: height, width, top, left."""
    if area is None:
        return whole
    height, width, top, left = area
    return min(whole[0] - top, height), min(whole[1] - left, width)

"""Image metrics of an edited image, against its source or the true edit.

Images are IMAGE tensors, [images, height, width, 3], 0 to 1; every metric is one number per image. The
EMU-Edit test set has no true edits, so its edits are compared with their source (arXiv 2508.20505). Value
ranges follow MagicBrush's public `image_eval.py` (arXiv 2306.10012) and PnPInversion's
`matrics_calculator.py` (arXiv 2310.01506).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from kornia.geometry.transform import resize
from kornia.metrics import ssim

from ..patches.attention.masks import check_mask

PSNR_CEILING = 100.0
_SSIM_WINDOW = 11
_VAE_STEP = 8
Network = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def measure(
    edited: torch.Tensor,
    reference: torch.Tensor,
    mask: torch.Tensor | None = None,
    networks: Mapping[str, Network] | None = None,
) -> dict[str, torch.Tensor]:
    """All metrics of `edited` against `reference`, [images] each, float32 on the CPU.

    `l1`, `l2`: mean absolute and mean squared difference of the values.
    `psnr`: -10 log10(l2) in dB, at most 100.
    `ssim`: mean of the map of Wang et al. (2004) with a Gaussian window of 11 pixels and sigma 1.5, per
    channel, as torchmetrics computes it.

    Inside a region, l1, l2 and psnr are means over the region's own values. PnPInversion divides by the
    number of pixels of the whole image, which gives -10 log10(the region's fraction) dB more. For ssim and
    for networks both images are multiplied by the mask, and the ssim map is averaged over the region.

    An edited image of another size is resized to the reference, as MagicBrush does. A reference that is
    larger by the few pixels that the host's VAE crops is cropped instead.

    Args:
        edited: [images, height, width, 3].
        reference: the same, or [1, height, width, 3] for all.
        mask: [images or 1, height, width], 0 to 1, with the reference's size or aspect ratio. It adds
            `<metric>_inside` and `<metric>_outside`, nan where that region is empty.
        networks: additional metrics by name, functions of two images [images, height, width, 3] -> [images].

    Raises ValueError if numbers of images, sizes or masks do not match.
    """
    edited, reference = _fit(edited[..., :3].float(), reference[..., :3].float())
    whole = torch.ones_like(edited[..., 0])
    found = _measure_region(edited, reference, whole, networks or {}, "")
    if mask is not None:
        inside = _fit_mask(mask.to(edited), *edited.shape[:3])
        for region, name in ((inside, "_inside"), (1 - inside, "_outside")):
            found |= _measure_region(edited, reference, region, networks or {}, name)
    return {name: values.detach().float().cpu() for name, values in found.items()}


def measure_edit(
    edited: torch.Tensor,
    source: torch.Tensor,
    target: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    networks: Mapping[str, Network] | None = None,
    text: Mapping[str, Network] | None = None,
) -> dict[str, torch.Tensor]:
    """`measure` against the source and, as `target_<metric>`, against the true edit if there is one.

    text: networks that compare the edited image with a text. They are measured once, without a `target_`
    copy.
    All other arguments as in `measure`.
    """
    networks = networks or {}
    found = measure(edited, source, mask, {**networks, **(text or {})})
    if target is not None:
        against = measure(edited, target, mask, networks)
        found |= {f"target_{name}": values for name, values in against.items()}
    return found


def _measure_region(
    edited: torch.Tensor,
    reference: torch.Tensor,
    region: torch.Tensor,
    networks: Mapping[str, Network],
    suffix: str,
) -> dict[str, torch.Tensor]:
    """region: [images, height, width], 0 to 1."""
    difference = edited - reference
    l2 = _mean(difference**2, region)
    edited, reference = (image * region[..., None] for image in (edited, reference))
    found = {
        "l1": _mean(difference.abs(), region),
        "l2": l2,
        "psnr": (-10 * l2.log10()).clamp(max=PSNR_CEILING),
        "ssim": _mean(_ssim_map(edited, reference), region),
    }
    for name, network in networks.items():
        values = network(edited, reference).to(l2)
        found[name] = torch.where(region.flatten(1).amax(dim=1) > 0, values, torch.nan)
    return {name + suffix: values for name, values in found.items()}


def _mean(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean, [images]; nan where all weights are 0.

    values: [images, height, width, 3].
    weights: [images, height, width].
    """
    return (values.mean(dim=-1) * weights).flatten(1).sum(dim=1) / weights.flatten(1).sum(dim=1)


def _ssim_map(edited: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    return ssim(edited.movedim(-1, 1), reference.movedim(-1, 1), _SSIM_WINDOW).movedim(1, -1)


def _fit(edited: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if len(reference) not in (1, len(edited)):
        raise ValueError(
            f"{len(edited)} edited images cannot be compared with {len(reference)}: give one to "
            "compare with, or one for each"
        )
    height, width = edited.shape[1:3]
    wanted_height, wanted_width = reference.shape[1:3]
    if _is_cropped(reference, height, width):
        reference = _crop(reference, height, width)
    elif abs(height * wanted_width - width * wanted_height) <= 0.01 * width * wanted_height:
        size = (wanted_height, wanted_width)
        edited = torch.nn.functional.interpolate(
            edited.movedim(-1, 1), size, mode="bicubic", antialias=True
        ).clamp(0, 1)
        edited = edited.movedim(1, -1)
    else:
        raise ValueError(
            f"the edited image is {width}x{height} but the one to compare with is "
            f"{wanted_width}x{wanted_height}: crop or pad them to the same aspect ratio"
        )
    if min(edited.shape[1:3]) < _SSIM_WINDOW:
        raise ValueError(
            f"images of {width}x{height} are too small: they need {_SSIM_WINDOW} pixels per side"
        )
    return edited, reference.expand_as(edited)


def _fit_mask(mask: torch.Tensor, images: int, height: int, width: int) -> torch.Tensor:
    check_mask(mask, images, height, width)
    if _is_cropped(mask, height, width):
        mask = _crop(mask, height, width)
    mask = resize(mask[:, None], (height, width), interpolation="area")[:, 0]
    return mask.clamp(0, 1).expand(images, -1, -1)


def _is_cropped(whole: torch.Tensor, height: int, width: int) -> bool:
    """Whether height and width are those of `whole` minus the few pixels that the host's VAE crops."""
    return 0 <= whole.shape[1] - height < _VAE_STEP and 0 <= whole.shape[2] - width < _VAE_STEP


def _crop(whole: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Centre crop, as the host's VAE crops."""
    top, left = (whole.shape[1] - height) // 2, (whole.shape[2] - width) // 2
    return whole[:, top : top + height, left : left + width]

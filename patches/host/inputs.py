"""Normalizes the masks, images and latents that users wire.

A wire's type says little about its tensor: other packs give masks without a batch, with a channel or as
booleans, images with one channel or with alpha, latents of videos. Every form with one meaning is accepted;
everything else is refused with the input's name.
"""

from __future__ import annotations

import math
from typing import Any

import torch

# Tolerance around 0 and 1 in a mask, for rounding and half precision.
_ROUNDING = 1e-3
# Tolerance around 0 and 1 in an image, for sharpening and resizing; the host clips it when it saves.
_OVERSHOOT = 0.5
_CHANNELS = (1, 3, 4)


def read_mask(name: str, mask: Any) -> torch.Tensor:
    """A mask as [masks, height, width], float32, 0 to 1.

    mask: [height, width], [masks, height, width], [masks, 1, height, width] or [masks, height, width, 1];
    floats from 0 to 1, integers 0 and 1, or booleans. A mask already in that form is returned unchanged.

    Raises ValueError, naming the input, for other shapes, values that are not finite and values outside 0 to
    1.
    """
    mask = _tensor(name, mask, "[masks, height, width]")
    shape = list(mask.shape)
    if len(shape) > 2 and shape[-1] == 1 and 1 not in shape[-3:-1]:
        mask = mask.squeeze(-1)
    if mask.ndim < 2 or any(size != 1 for size in mask.shape[1:-2]):
        raise ValueError(
            f"{name} has shape {shape} but must be [masks, height, width]: take one channel of it "
            "with Convert Image to Mask"
        )
    mask = mask.reshape(-1, *mask.shape[-2:]).float().contiguous()
    least, most = _range(name, mask, "make the mask again")
    if least < -_ROUNDING or most > 1 + _ROUNDING:
        raise ValueError(
            f"{name} has values from {least} to {most} but they must be from 0 to 1: scale it "
            "(divide 0 to 255 by 255), or cut it with Threshold Mask"
        )
    return mask if least >= 0 and most <= 1 else mask.clamp(0, 1)


def read_images(name: str, images: Any) -> torch.Tensor:
    """Images as [images, height, width, 3], float32, 0 to 1.

    images: [images, height, width, channels] or [height, width, channels], floats. One channel is repeated
    three times; a fourth one, alpha, is dropped, as in the host's VAEEncode. Values up to 0.5 outside 0 to 1
    are clipped, as in the host's SaveImage. Images already in that form are returned unchanged.

    Raises ValueError, naming the input, for other shapes, integers, values further outside and values that
    are not finite.
    """
    images = _tensor(name, images, "[images, height, width, channels]")
    shape = list(images.shape)
    if images.ndim == 3 and shape[-1] in _CHANNELS:
        images = images[None]
    if images.ndim != 4 or images.shape[-1] not in _CHANNELS:
        raise ValueError(
            f"{name} has shape {shape} but must be [images, height, width, channels] with 1, 3 or 4 "
            "channels: convert it to an ordinary IMAGE (a mask with Convert Mask to Image)"
        )
    if not (images.is_floating_point() or images.dtype == torch.bool):
        raise ValueError(
            f"{name} has whole numbers ({str(images.dtype).removeprefix('torch.')}) but must have "
            "floats from 0 to 1: divide 0 to 255 by 255"
        )
    images = images[..., :3].float()
    least, most = _range(name, images, "the VAE or the model has failed there, often in half precision")
    if least < -_OVERSHOOT or most > 1 + _OVERSHOOT:
        raise ValueError(
            f"{name} has values from {least} to {most} but they must be from 0 to 1: scale it "
            "(divide 0 to 255 by 255)"
        )
    images = images if least >= 0 and most <= 1 else images.clamp(0, 1)
    return images.expand(*images.shape[:-1], 3).contiguous()


def samples_of(name: str, latent: dict[str, Any]) -> Any:
    """A LATENT's `samples`. Raises ValueError, naming the input, if it has none."""
    if "samples" not in latent:
        raise ValueError(
            f"{name} has no samples but only {', '.join(map(str, latent)) or 'nothing'}: wire the "
            "LATENT of an image, from VAEEncode"
        )
    return latent["samples"]


def read_samples(name: str, samples: Any, model: Any) -> torch.Tensor:
    """A LATENT's `samples` as [images, channels, height, width] of the MODEL, float32, or as [images,
    channels, 1, height, width] where the MODEL has frames.

    Raises ValueError, naming the input, for latents of another rank (videos, audio, several in one) or
    another family's channels, and for values that are not finite.
    """
    latents = model.get_model_object("latent_format")
    channels, framed = latents.latent_channels, latents.latent_dimensions == 3
    wanted = f"[images, {channels}, {'1, ' * framed}height, width]"
    samples = _tensor(name, samples, wanted)
    if framed and samples.ndim == 4:
        samples = samples.unsqueeze(2)
    if samples.ndim != 4 + framed or (framed and samples.shape[2] > 1) or samples.shape[1] != channels:
        frames = samples.shape[2] if samples.ndim == 5 else 0
        kind = f", a video of {frames} frame{'s' * (frames > 1)}," if frames else ""
        raise ValueError(
            f"{name} has shape {list(samples.shape)}{kind} but this model needs {wanted}: encode the image "
            "with the model's own VAE"
        )
    samples = samples.float()
    _range(name, samples, "encode a sound image again")
    return samples


def check_noise_mask(mask: torch.Tensor) -> None:
    """Raise ValueError unless a noise mask, as scaled by the host, is from 0 to 1."""
    name = "the noise mask in latent_image"
    least, most = _range(name, mask, "make the mask again")
    if least < -_ROUNDING or most > 1 + _ROUNDING:
        raise ValueError(
            f"{name} has values from {least} to {most} but they must be from 0 to 1: scale it "
            "before Set Latent Noise Mask"
        )


def _tensor(name: str, value: Any, wanted: str) -> torch.Tensor:
    """`value` if it is a non-empty tensor of real numbers; else raises ValueError."""
    if not isinstance(value, torch.Tensor) or value.is_nested:
        found = "several tensors in one" if getattr(value, "is_nested", False) else type(value).__name__
        raise ValueError(f"{name} is {found} but must be one tensor {wanted}: take one of them")
    if value.numel() == 0 or value.is_complex():
        found = "of complex numbers" if value.is_complex() else f"empty, of shape {list(value.shape)},"
        raise ValueError(f"{name} is {found} but must be {wanted}: see what made it")
    return value


def _range(name: str, values: torch.Tensor, advice: str) -> tuple[float, float]:
    least, most = torch.stack(values.aminmax()).tolist()
    if not (math.isfinite(least) and math.isfinite(most)):
        raise ValueError(
            f"{name} has values that are not finite (NaN or infinite) but must be numbers: {advice}"
        )
    return least, most

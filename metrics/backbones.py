"""Networks for metrics: DINO from the user's files, CLIP through the host's own objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import folder_paths
import safetensors
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.model_patcher import ModelPatcher
from einops import rearrange, repeat
from torchvision.transforms.functional import InterpolationMode, center_crop, normalize, resize

from ..models.operations import manual_cast

FOLDER = "descriptive_edit"  # in the host's models folder: the files of DINO and LPIPS
_MEAN, _DEVIATION = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's

folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))


def manage(build: Callable[[], torch.nn.Module], weights: Mapping[str, torch.Tensor]) -> ModelPatcher:
    """A ModelPatcher of the network that `build` makes, with these weights."""
    management = comfy.model_management
    with torch.inference_mode(False):
        model = build()
        patcher = comfy.model_patcher.CoreModelPatcher(
            model.eval().requires_grad_(False),
            load_device=management.get_torch_device(),
            offload_device=management.unet_offload_device(),
        )
        model.load_state_dict(weights, assign=patcher.is_dynamic())
    return patcher


@torch.inference_mode()
def on_device(patcher: ModelPatcher, *images: torch.Tensor) -> torch.Tensor:
    """The output of the managed network, computed on its device."""
    comfy.model_management.load_models_gpu([patcher])
    return patcher.model(*(image.to(patcher.load_device) for image in images))


class _Block(torch.nn.Module):
    def __init__(self, width: int, operations: Any) -> None:
        super().__init__()
        self.norm1 = operations.LayerNorm(width, eps=1e-6)
        self.attn = torch.nn.ModuleDict(
            {"qkv": operations.Linear(width, 3 * width), "proj": operations.Linear(width, width)}
        )
        self.norm2 = operations.LayerNorm(width, eps=1e-6)
        self.mlp = torch.nn.ModuleDict(
            {"fc1": operations.Linear(width, 4 * width), "fc2": operations.Linear(4 * width, width)}
        )
        self._heads = width // 64

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = tokens + self.attn["proj"](optimized_attention(*self.qkv(tokens), self._heads))
        return tokens + self.mlp["fc2"](torch.nn.functional.gelu(self.mlp["fc1"](self.norm2(tokens))))

    def qkv(self, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values, each [images, tokens, width], all heads concatenated."""
        return self.attn["qkv"](self.norm1(tokens)).chunk(3, dim=-1)


class Dino(torch.nn.Module):
    """DINO's vision transformer (arXiv 2104.14294), with the state dict names of the authors' files.

    Args:
        width: channels of a token; heads are 64 wide.
        patch: pixels per side of a patch.
        depth: number of blocks.
        positions: image tokens in the position table, a square number.
        keys: return the last block's keys, all heads concatenated, instead of its normed output.
    """

    def __init__(
        self,
        width: int,
        patch: int,
        depth: int,
        positions: int,
        *,
        keys: bool = False,
        operations: Any = manual_cast,
    ) -> None:
        super().__init__()
        self.cls_token = torch.nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = torch.nn.Parameter(torch.zeros(1, 1 + positions, width))
        self.patch_embed = torch.nn.ModuleDict({"proj": operations.Conv2d(3, width, patch, patch)})
        self.blocks = torch.nn.ModuleList(_Block(width, operations) for _ in range(depth))
        self.norm = operations.LayerNorm(width, eps=1e-6)
        self._patch, self._keys = patch, keys

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Tokens [images, 1 + tokens, width] of [images, 3, height, width], normalised with ImageNet's mean
        and std.

        Pixels beyond whole patches are cut off.
        """
        grid = self.patch_embed["proj"](images)
        first = repeat(self.cls_token.to(grid), "1 1 c -> b 1 c", b=len(grid))
        tokens = torch.cat([first, rearrange(grid, "b c h w -> b (h w) c")], dim=1)
        tokens = tokens + self._positions(*grid.shape[-2:]).to(tokens)
        for block in self.blocks[:-1]:
            tokens = block(tokens)
        last = self.blocks[-1]
        assert isinstance(last, _Block)
        if self._keys:
            return last.qkv(tokens)[1]
        return self.norm(last(tokens))

    def _positions(self, height: int, width: int) -> torch.Tensor:
        side = int((self.pos_embed.shape[1] - 1) ** 0.5)
        if (height, width) == (side, side):
            return self.pos_embed
        table = rearrange(self.pos_embed[:, 1:].float(), "1 (h w) c -> 1 c h w", h=side)
        # The authors' code adds a tenth of a token to the grid's size.
        scale = ((height + 0.1) / side, (width + 0.1) / side)
        table = torch.nn.functional.interpolate(table, scale_factor=scale, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1].float(), rearrange(table, "1 c h w -> 1 (h w) c")], dim=1)


def dino_from(
    weights: Mapping[str, torch.Tensor], name: str, width: int, patch: int, *, keys: bool
) -> ModelPatcher:
    """A managed `Dino`. Raises ValueError, naming the file, if the weights have another width or patch."""
    kernel, positions = weights.get("patch_embed.proj.weight"), weights.get("pos_embed")
    if kernel is None or positions is None or tuple(kernel.shape) != (width, 3, patch, patch):
        found = "no DINO weights" if kernel is None else f"weights of shape {list(kernel.shape)}"
        raise ValueError(
            f"{name} holds {found}, not DINO's backbone of width {width} and patch {patch}: "
            "use the file of the DINO authors' release"
        )
    depth = len({key.split(".")[1] for key in weights if key.startswith("blocks.")})
    build = partial(Dino, width, patch, depth, positions.shape[1] - 1, keys=keys)
    try:
        return manage(build, {key: weight.float() for key, weight in weights.items()})
    except RuntimeError as error:
        raise ValueError(f"{name} is not a whole DINO backbone: {error}") from None


def _read_dino(name: str, width: int, patch: int, *, keys: bool) -> ModelPatcher:
    files = [f"{name}{ending}" for ending in (".safetensors", ".pth")]
    paths = [path for file in files if (path := folder_paths.get_full_path(FOLDER, file)) is not None]
    if not paths:
        raise ValueError(
            f"{files[1]} is missing: put it, from the DINO authors' release "
            f"(github.com/facebookresearch/dino), into models/{FOLDER}"
        )
    return dino_from(comfy.utils.load_torch_file(paths[0], safe_load=True), paths[0], width, patch, keys=keys)


class DinoSimilarity:
    """DINO-I: cosine similarity of the class tokens of ViT-S/16 of two IMAGEs, [images], -1 to 1.

    As in MagicBrush's script: short side to 256 pixels (bicubic), centre crop 224x224, ImageNet
    normalisation.
    Raises ValueError if the file is not in models/descriptive_edit.
    """

    def __init__(self) -> None:
        self._patcher = _read_dino("dino_deitsmall16_pretrain", 384, 16, keys=False)

    def __call__(self, edited: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        first, second = (on_device(self._patcher, _square(image))[:, 0] for image in (edited, reference))
        return torch.cosine_similarity(first, second)


class StructureDistance:
    """DINO structure distance of two IMAGEs, [images], 0 for equal images (Splice, arXiv 2201.00424, Eq. 4).

    Mean squared difference of the cosine self-similarities of the last block's keys of ViT-B/8, heads
    concatenated, class token included.
    Short side to 224 pixels, long side at most 480, ImageNet normalisation, as in PnPInversion's script. That
    script feeds values of 0 to 255 to a network trained on 0 to 1, so its published values have another
    scale.
    Raises ValueError if the file is not in models/descriptive_edit.
    """

    def __init__(self) -> None:
        self._patcher = _read_dino("dino_vitbase8_pretrain", 768, 8, keys=True)

    def __call__(self, edited: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        distances = []
        for pair in zip(edited, reference, strict=True):  # the similarities of one image can take 100 MB
            first, second = (_self_similarity(on_device(self._patcher, _whole(image))) for image in pair)
            distances.append((first - second).square().mean())
        return torch.stack(distances)


def _self_similarity(keys: torch.Tensor) -> torch.Tensor:
    keys = torch.nn.functional.normalize(keys[0], dim=-1)
    return keys @ keys.T


def _square(images: torch.Tensor) -> torch.Tensor:
    resized = resize(images.movedim(-1, 1), [256], InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    return normalize(center_crop(resized, [224]), _MEAN, _DEVIATION)


def _whole(image: torch.Tensor) -> torch.Tensor:
    resized = resize(image.movedim(-1, 0)[None], [224], max_size=480, antialias=True)
    return normalize(resized, _MEAN, _DEVIATION)


class ClipSimilarity:
    """CLIP-I: cosine similarity of the embeddings of two IMAGEs, [images], -1 to 1.

    clip_vision: the host's CLIP_VISION, which scales the short side to its size and crops the centre.
    MagicBrush uses ViT-B/32; values of other networks are not comparable.
    """

    def __init__(self, clip_vision: Any) -> None:
        self._clip_vision = clip_vision

    def __call__(self, edited: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        first, second = (image_embeddings(self._clip_vision, image) for image in (edited, reference))
        return torch.cosine_similarity(first, second)


class ClipText:
    """CLIP-T: cosine similarity of the embeddings of the edited IMAGE and of a text, [images], -1 to 1.

    clip_vision, clip: the two halves of one CLIP. PnPInversion's CLIP score is 100 times this with ViT-L/14;
    MagicBrush uses ViT-B/32.
    Text beyond one context is cut off.
    Raises ValueError if `clip` has no text projection, as in a Stable Diffusion 1.5 checkpoint, or another
    width than `clip_vision`.
    """

    def __init__(self, clip_vision: Any, clip: Any, text: str) -> None:
        self._clip_vision = clip_vision
        self._text = text_embedding(clip, text)

    def __call__(self, edited: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        images = image_embeddings(self._clip_vision, edited)
        if images.shape[1] != self._text.shape[1]:
            raise ValueError(
                f"clip_vision embeds into {images.shape[1]} numbers and clip into "
                f"{self._text.shape[1]}: load the two halves of one CLIP"
            )
        return torch.cosine_similarity(images, self._text.to(images))


def image_embeddings(clip_vision: Any, images: torch.Tensor) -> torch.Tensor:
    embeddings = clip_vision.encode_image(images)["image_embeds"]
    if embeddings is None or embeddings.ndim != 2:
        raise ValueError("clip_vision is not a CLIP with an image projection: load a CLIP's")
    return embeddings.float()


def text_embedding(clip: Any, text: str) -> torch.Tensor:
    """[1, width]: the projected embedding, which the host leaves out for Stable Diffusion 1.5's CLIP."""
    if not text.strip():
        raise ValueError("description is empty: say what the edited image should show")
    _check_projection(clip)
    encoder = clip.cond_stage_model
    tokens = {name: chunks[:1] for name, chunks in clip.tokenize(text).items()}
    encoder.reset_clip_options()
    encoder.set_clip_options({"projected_pooled": True})
    try:
        clip.load_model(tokens)
        encoder.set_clip_options({"execution_device": clip.patcher.load_device})
        with torch.inference_mode():
            pooled = encoder.encode_token_weights(tokens)[1]
    finally:
        encoder.reset_clip_options()
    if pooled is None or not bool(pooled.isfinite().all()) or not bool(pooled.any()):
        raise ValueError(_NO_PROJECTION)
    return pooled.float()


_NO_PROJECTION = (
    "clip has no text projection (a Stable Diffusion 1.5 checkpoint has none): load the text half "
    "of the same CLIP as clip_vision, from a file that holds `text_projection`, with CLIPLoader"
)


def _check_projection(clip: Any) -> None:
    """Check CLIP's files: the host leaves a missing projection uninitialised."""
    _, arguments, *_ = getattr(clip.patcher, "cached_patcher_init", None) or (None, ((),))
    paths = [arguments[0]] if isinstance(arguments[0], (str, Path)) else arguments[0]
    files = [Path(path) for path in paths]
    if not files or any(file.suffix not in (".safetensors", ".sft") for file in files):
        return
    names: list[str] = []
    for file in files:
        with safetensors.safe_open(str(file), framework="pt") as weights:
            names += weights.keys()
    if not any("text_projection" in name for name in names):
        raise ValueError(_NO_PROJECTION)

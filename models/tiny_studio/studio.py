"""Loads the Tiny Studio as the host's own MODEL, CLIP and VAE.

The host detects a checkpoint's family from a fixed list of widths that does not contain this one. So its
`SD15` family is subclassed here and passed to the host's classes directly; no list of the host is changed.
"""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.utils
import safetensors
import safetensors.torch
import torch
from comfy.sd1_clip import SD1ClipModel, SD1Tokenizer, SDClipModel, SDTokenizer
from comfy.supported_models import SD15
from comfy.supported_models_base import BASE, ClipTarget

from . import networks, words

FILE = Path(__file__).with_name("tiny_studio.safetensors")
BRIDGE = Path(__file__).with_name("bridge.safetensors")


class TinySD15(SD15):
    """SD1.5 with other widths."""

    unet_config: ClassVar[dict] = {}
    unet_extra_config: ClassVar[dict] = {"num_heads": networks.UNET["num_heads"], "num_head_channels": -1}


class TinyTextEncoder(SDClipModel):
    """CLIP text encoder of small width whose output is zero from the end mark on.

    Otherwise a small model would learn to read the padding instead of the words.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(
            textmodel_json_config=dict(networks.TEXT),
            special_tokens={"start": words.START, "end": None, "pad": words.END},
            zero_out_masked=True,
            **options,
        )


class TinyClip(SD1ClipModel):
    """The host's container of one text encoder, holding ours."""

    def __init__(self, **options: Any) -> None:
        super().__init__(clip_model=TinyTextEncoder, **options)


class TinyTokenizer(SD1Tokenizer):
    """CLIP's tokens, for embeddings of this width. Warns once of each word that is not known.

    known: the tokens of the embedding table.
    """

    known: frozenset[int] = frozenset()

    def __init__(self, **options: Any) -> None:
        width = networks.TEXT["hidden_size"]
        super().__init__(tokenizer=partial(SDTokenizer, embedding_size=width), **options)
        self._named: set[str] = set()

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **options: Any) -> Any:
        unknown = [word for word in words.unknown(text, self.known) if word not in self._named]
        self._named.update(unknown)
        if unknown:
            logging.warning(
                "Tiny Studio: %s not known, so without effect. The help of Load Tiny Studio lists its words.",
                ", ".join(unknown),
            )
        return super().tokenize_with_weights(text, return_word_ids, **options)


def load_model(
    path: Path = FILE, disable_dynamic: bool = False, dtype: torch.dtype | None = None
) -> comfy.model_patcher.ModelPatcher:
    """The UNet, ready for any sampler of the host. dtype: of its weights, None for the host's choice."""
    state = read_weights(path, "unet.")
    config = TinySD15(comfy.model_detection.detect_unet_config(state, ""))
    patcher, dtype = make_model(config, state, disable_dynamic, dtype)
    patcher.cached_patcher_init = (partial(load_model, dtype=dtype), (path,))
    return patcher


def make_model(
    config: BASE, state: dict[str, torch.Tensor], disable_dynamic: bool, dtype: torch.dtype | None
) -> tuple[comfy.model_patcher.ModelPatcher, torch.dtype]:
    """MODEL of a family from its weights, and their dtype. dtype: as above."""
    management = comfy.model_management
    device = management.get_torch_device()
    dtype = dtype or management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(state),
        supported_dtypes=list(config.supported_inference_dtypes),
        weight_dtype=comfy.utils.weight_dtype(state),
    )
    config.set_inference_dtype(
        dtype, management.unet_manual_cast(dtype, device, config.supported_inference_dtypes)
    )
    model = config.get_model(state, "")
    kind = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = kind(model, load_device=device, offload_device=management.unet_offload_device())
    # With dynamic VRAM a layer takes the dtype of its loaded weights, not the requested one.
    state = {name: weight.to(dtype) for name, weight in state.items()}
    model.load_model_weights(state, "", assign=patcher.is_dynamic())
    return patcher, dtype


def load_clip(path: Path = FILE, disable_dynamic: bool = False) -> comfy.sd.CLIP:
    """The text encoder. Words outside the training have a zero embedding, so they have no effect."""
    state = read_weights(path, "text.")
    rows, table = state.pop("tokens"), state.pop("table")
    full = torch.zeros(networks.TEXT["vocab_size"], table.shape[1], dtype=table.dtype)
    full[rows] = table
    state["text_model.embeddings.token_embedding.weight"] = full
    parameters = comfy.utils.calculate_parameters(state)
    target = ClipTarget(TinyTokenizer, TinyClip)
    clip = comfy.sd.CLIP(target, parameters=parameters, state_dict=[state], disable_dynamic=disable_dynamic)
    clip.tokenizer.known = frozenset(rows.tolist())
    clip.patcher.cached_patcher_init = (_clip_patcher, (path,))
    return clip


def _clip_patcher(path: Path, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """What the host calls for a copy with weights of its own."""
    return load_clip(path, disable_dynamic).patcher


def known_tokens(path: Path = FILE) -> frozenset[int]:
    """The tokens of the embedding table."""
    with safetensors.safe_open(path, "pt") as file:
        return frozenset(file.get_tensor("text.tokens").tolist())


def unknown_words(clip: Any, *texts: str) -> list[str]:
    """Words of the texts that the Tiny Studio does not know; none for another model's CLIP."""
    tokenizer = getattr(clip, "tokenizer", None)
    return words.unknown(" ".join(texts), tokenizer.known) if isinstance(tokenizer, TinyTokenizer) else []


def load_vae(path: Path = FILE, dtype: torch.dtype | None = None) -> comfy.sd.VAE:
    """The VAE: 8 pixels a latent cell, 4 channels. dtype: of its weights, None for the host's choice."""
    return comfy.sd.VAE(sd=read_weights(path, "vae."), config={"params": networks.VAE}, dtype=dtype)


def read_weights(path: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """The weights in a file whose names begin with `prefix`, without it.

    Raises FileNotFoundError if the file is missing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"Tiny Studio: {path.name} is missing from {path.parent}; reinstall the pack")
    state = safetensors.torch.load_file(path)
    return comfy.utils.state_dict_prefix_replace(state, {prefix: ""}, filter_keys=True)

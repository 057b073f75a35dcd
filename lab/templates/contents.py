"""The templates and the blueprints by name."""

from __future__ import annotations

from collections.abc import Callable

from . import blueprints, bridge, training, unify
from .graph import Blueprint, Graph

TEMPLATES: dict[str, Callable[[Graph], None]] = {
    "01 Start here": unify.start,
    "02 Image and text guidance": bridge.guidance,
    "03 Edit a photo": unify.photo,
    "04 Photo with ControlNet": unify.control,
    "05 Photo by instruction": unify.instruction,
    "06 Make edit pairs": training.make_pairs,
    "07 Train a tiny bridge": training.train_tiny,
    "08 Train a bridge": training.train,
    "09 Photo with a bridge": bridge.bridge,
    "10 Bridge with ControlNet": bridge.bridge_control,
    "11 Bridge with IP-Adapter": bridge.bridge_adapter,
    "12 UnifyEdit in parts": unify.parts,
    "13 Edit a photo with SDXL": unify.photo_sdxl,
    "14 Flux with a bridge": bridge.bridge_flux,
    "15 Flux with UnifyEdit": unify.photo_flux,
    "16 Start here with Flux": unify.start_flux,
}

BLUEPRINTS: dict[str, tuple[Callable[[Blueprint], None], str]] = {
    "Edit by description (UnifyEdit)": (
        blueprints.unify,
        "Edits a photo without training. Connect a model, CLIP, VAE and the photo, and type what it shows "
        "and what it should show, with only the words of the edit changed. A mask limits the edit; without "
        "one auto_mask finds it. seed matters with the inversion virtual only. side: 512 for SD1.x, 1024 "
        "for SDXL, 128 for the Tiny Studio.",
    ),
    "Edit by description (attention bridge)": (
        blueprints.bridge,
        "Draws what you describe while it attends to your photo through an attention bridge. Connect a model "
        "and the bridge trained for it, CLIP, VAE and the photo. More image_guidance keeps more of the "
        "photo, more text_guidance follows the text more. side: 512 for SD1.x, 128 for the Tiny Studio.",
    ),
}

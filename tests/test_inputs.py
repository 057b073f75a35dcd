"""Masks, images and latents in the forms that people and other packs wire them, at every node that takes one.

Each form gives the very bits of the canonical one, or is refused by the node's and the input's name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import bridge_edit
import numpy as np
import pytest
import small_models
import torch
from bridge_edit import apply_bridge, random_bridge
from comfy.nested_tensor import NestedTensor
from host import Host
from PIL import Image
from unify_edit import SIZE, Edit, box_mask

SIDE = 32
NAN = float("nan")
MASKS = {
    "no batch": lambda mask: mask[0],
    "a channel": lambda mask: mask[:, None],
    "a channel at the end": lambda mask: mask[..., None],
    "a channel and no batch": lambda mask: mask[0, ..., None],
    "a video's": lambda mask: mask[:, None, None],
    "booleans": lambda mask: mask > 0,
    "integers": lambda mask: mask.long(),
    "bytes": lambda mask: mask.byte(),
    "half precision": lambda mask: mask.half(),
    "double precision": lambda mask: mask.double(),
    "rounding": lambda mask: mask * 1.0000002 - 1e-8,
}
BAD_MASKS = {
    "has values from 0.0 to 255.0 but": lambda mask: mask * 255,
    "has values from 0.0 to 2.0 but": lambda mask: (mask * 2).byte(),
    "has values from -1.0 to 0.0 but": lambda mask: 0 - mask,
    "has values that are not finite": lambda mask: mask / mask,
    "has values that are not finite (": lambda mask: torch.where(mask > 0, float("inf"), 0.0),
    "has shape [1, 3,": lambda mask: mask[:, None].expand(-1, 3, -1, -1),
    "has shape [7]": lambda mask: torch.ones(7),
    "is empty, of shape [0,": lambda mask: mask[:0],
    "is of complex numbers": lambda mask: mask + 0j,
    "is list but": lambda mask: [mask],
}
IMAGES = {
    "no batch": lambda image: image[0],
    "alpha": lambda image: torch.cat([image, image[..., :1] * 0.3], dim=-1),
    "alpha and no batch": lambda image: torch.cat([image, image[..., :1]], dim=-1)[0],
    "double precision": lambda image: image.double(),
    "half precision": lambda image: image.half(),
    "brain floats": lambda image: image.bfloat16(),
    "overshoot": lambda image: torch.where(image == 1, 1.25, torch.where(image == 0, -0.25, image)),
}
BAD_IMAGES = {
    "has values from 0.0 to 255.0 but": lambda image: image * 255,
    "has values from -1.0 to 1.0 but": lambda image: image * 2 - 1,
    "has whole numbers (uint8)": lambda image: (image * 255).byte(),
    "has values that are not finite": lambda image: image.log(),
    "has shape [1, 3,": lambda image: image.movedim(-1, 1),
    "has shape [1, 32, 32]": lambda image: torch.ones(1, 32, 32),
    "has shape [1, 32, 32, 2]": lambda image: torch.ones(1, 32, 32, 2),
    "has shape [1, 1, 32, 32, 3]": lambda image: torch.ones(1, 1, 32, 32, 3),
    "is empty, of shape [0,": lambda image: image[:0],
}
BAD_LATENTS = {
    "has shape [4, 16, 16]": lambda samples: {"samples": samples[0]},
    "has shape [1, 4, 3, 16, 16]": lambda samples: {"samples": samples[:, :, None].expand(-1, -1, 3, -1, -1)},
    "has shape [1, 16, 16, 16]": lambda samples: {"samples": samples.repeat(1, 4, 1, 1)},
    "is several tensors in one": lambda samples: {"samples": NestedTensor([samples, samples])},
    "is empty, of shape [0,": lambda samples: {"samples": samples[:0]},
    "has values that are not finite": lambda samples: {"samples": samples * NAN},
    "has no samples but only audio": lambda samples: {"audio": samples},
}


class Graphs:
    """Runs of the nodes that take a mask, an image or a latent; each returns a tensor or a text."""

    def __init__(self, host: Host) -> None:
        self.host, self.model = host, small_models.small_unet()
        self.bridge = random_bridge(host, self.model)
        self.edit = Edit(host, self.model, steps=1, refine=0)
        self.latent = self.edit.latent
        picture = torch.linspace(0, 4, SIDE * SIDE * 3).frac().mul(64).round().div(64)
        self.image = picture.reshape(1, SIDE, SIDE, 3)
        self.image[0, 0, 0], self.image[0, 1, 1] = 0, 1

    def apply(self, mask: Any) -> torch.Tensor:
        patched = apply_bridge(self.host, self.model, self.bridge, small_models.latent(9), mask=mask)
        return bridge_edit.sample(self.host, patched, steps=1)

    def unify(self, mask: Any) -> torch.Tensor:
        edit = copy.copy(self.edit)
        edit.sampler_inputs = {"mask": mask}
        return edit.run()

    def unify_node(self, **inputs: Any) -> torch.Tensor:
        return self.host.execute("DescEditUnify", **{**self._edit_inputs(), "steps": 1, **inputs})[0][
            "samples"
        ]

    def find_mask(self, latent: Any) -> torch.Tensor:
        return self.host.execute("DescEditFindMask", **{**self._edit_inputs(), "latent": latent})[0]

    def _edit_inputs(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "source": small_models.conditioning(1),
            "edit": self.edit.positive,
            "edit_tokens": self.edit.tokens,
            "latent": self.latent,
        }

    def measure(self, **inputs: Any) -> str:
        images = {"edited": self.image.flip(1), "source": self.image}
        return self.host.execute("DescEditMetrics", **{**images, **inputs})[0]

    def crop(self, image: Any, mask: Any = None) -> torch.Tensor:
        found = self.host.execute("DescEditCrop", image=image, mask=mask, side=64, context=1.0)
        return torch.cat([found[0], found[1][..., None]], dim=-1)

    def stitch(self, **inputs: Any) -> torch.Tensor:
        crop = self.host.execute("DescEditCrop", image=self.image, side=64, context=1.0)[2]
        return self.host.execute(
            "DescEditStitch", **{"edited": self.image.flip(1), **inputs}, crop=crop, blend=0
        )[0]

    def save(self, **inputs: Any) -> torch.Tensor:
        images = {"source": self.image, "edited": self.image, **inputs}
        texts = {"source_description": "a circle", "edit_description": "a square", "folder": "swept"}
        (name,) = self.host.execute("DescEditSavePair", **images, **texts)
        kinds = {"source": "source", "edited": "edit"}
        files = [self.host.base / "input" / "swept" / f"{name}_{kinds[given]}.png" for given in inputs]
        with Image.open(files[0]) as picture:
            return torch.from_numpy(np.array(picture))

    def compare(self, image: Any) -> torch.Tensor:
        images = {"image0": image, "image1": self.image}
        return self.host.execute("DescEditCompare", images=images, side=64)[0]

    def maps(self, **inputs: Any) -> torch.Tensor:
        given = {"conditioning": self.edit.positive, "edit_tokens": self.edit.tokens, "latent": self.latent}
        return self.host.execute("DescEditAttentionMaps", model=self.model, side=64, **{**given, **inputs})[0]

    def invert(self, latent: Any) -> torch.Tensor:
        source = small_models.conditioning(1)
        sigmas = self.edit.sigmas
        inputs = {"model": self.model, "latent": latent, "source": source, "sigmas": sigmas, "refine": 0}
        return self.host.execute("DescEditInvert", **inputs)[1]["samples"]

    def grid(self, latent: Any) -> torch.Tensor:
        patched = apply_bridge(self.host, self.model, self.bridge, small_models.latent(9))
        text = {"edit": self.edit.positive, "unconditional": small_models.conditioning(2)}
        scales = {"image_guidance": "1", "text_guidance": "3", "steps": 1, "seed": 1}
        vae = SimpleNamespace(decode=lambda samples: samples[:, :3].movedim(1, -1).sigmoid())
        inputs = {"model": patched, "vae": vae, **text, "latent": latent, **scales}
        return self.host.execute("DescEditGuidanceGrid", **inputs)[0]

    def reference(self, latent: Any) -> torch.Tensor:
        (patched,) = self.host.execute(
            "DescEditApplyBridge",
            model=self.model,
            bridge=self.bridge,
            reference=latent,
            source=small_models.conditioning(1),
        )
        return bridge_edit.sample(self.host, patched, steps=1)


@pytest.fixture(scope="module")
def graphs(host: Host) -> Graphs:
    """Small models and inputs for them."""
    return Graphs(host)


def mask_runs(graphs: Graphs) -> dict[tuple[str, str], tuple[Callable[[Any], Any], torch.Tensor]]:
    """By node and input: a run with that mask, and a canonical one."""
    small = torch.zeros(1, SIDE, SIDE)
    small[:, :, : SIDE // 2] = 1
    return {
        ("DescEditApplyBridge", "mask"): (graphs.apply, box_mask()),
        ("DescEditUnifySampler", "mask"): (graphs.unify, box_mask()),
        ("DescEditUnify", "mask"): (lambda mask: graphs.unify_node(mask=mask), box_mask()),
        ("DescEditMetrics", "mask"): (lambda mask: graphs.measure(mask=mask), small),
        ("DescEditCrop", "mask"): (lambda mask: graphs.crop(graphs.image, mask), small),
        ("DescEditStitch", "mask"): (lambda mask: graphs.stitch(mask=mask), small),
    }


def image_runs(graphs: Graphs) -> dict[tuple[str, str], Callable[[Any], Any]]:
    """By node and input: a run with that image."""
    return {
        ("DescEditCompare", "image0"): graphs.compare,
        ("DescEditAttentionMaps", "image"): lambda image: graphs.maps(image=image),
        ("DescEditMetrics", "edited"): lambda image: graphs.measure(edited=image),
        ("DescEditMetrics", "source"): lambda image: graphs.measure(source=image),
        ("DescEditMetrics", "target"): lambda image: graphs.measure(target=image),
        ("DescEditCrop", "image"): graphs.crop,
        ("DescEditStitch", "edited"): lambda image: graphs.stitch(edited=image),
        ("DescEditSavePair", "source"): lambda image: graphs.save(source=image),
        ("DescEditSavePair", "edited"): lambda image: graphs.save(edited=image),
    }


def latent_runs(graphs: Graphs) -> dict[tuple[str, str], Callable[[Any], Any]]:
    """By node and input: a run with that latent."""
    return {
        ("DescEditApplyBridge", "reference"): graphs.reference,
        ("DescEditInvert", "latent"): graphs.invert,
        ("DescEditAttentionMaps", "latent"): lambda latent: graphs.maps(latent=latent),
        ("DescEditUnify", "latent"): lambda latent: graphs.unify_node(latent=latent),
        ("DescEditFindMask", "latent"): graphs.find_mask,
        ("DescEditGuidanceGrid", "latent"): graphs.grid,
    }


def same(found: Any, wanted: Any) -> bool:
    return found == wanted if isinstance(wanted, str) else torch.equal(found, wanted)


def title(graphs: Graphs, node: str) -> str:
    """What a user reads on the node."""
    return graphs.host.node(node).GET_SCHEMA().display_name


def refusal(run: Callable[[Any], Any], value: Any) -> str:
    """What `run` says of `value`."""
    with pytest.raises(Exception, match=r"^[A-Z][\w ()]+: ") as caught:
        run(value)
    return str(caught.value)


def test_every_node_is_swept(host: Host, graphs: Graphs) -> None:
    """Protects: a new node with a mask, an image or a latent joins the tests of this file."""
    swept = {
        "MASK": {*mask_runs(graphs)},
        "IMAGE": {*image_runs(graphs)} - {("DescEditCompare", "image0")},  # a growing input
        "LATENT": {*latent_runs(graphs)},
    }
    schemas = {node_id: host.node(node_id).GET_SCHEMA() for node_id in host.node_ids()}
    for kind, pairs in swept.items():
        inputs = ((node, item) for node, schema in schemas.items() for item in schema.inputs)
        assert {(node, item.id) for node, item in inputs if item.io_type == kind} == pairs


def test_masks(graphs: Graphs) -> None:
    """Protects: every form of a mask acts as the canonical one, to the bit, and none leaves it unused."""
    for (node, _), (run, mask) in mask_runs(graphs).items():
        wanted = run(mask)
        assert not same(run(mask.flip(-1)), wanted), node
        for form, change in MASKS.items():
            assert same(run(change(mask)), wanted), (node, form)


def test_masks_of_two_images(graphs: Graphs) -> None:
    """Protects: a batch of masks with a channel is still one mask for each image."""
    pair = torch.cat([graphs.image, graphs.image.flip(2)])
    masks = torch.zeros(2, SIDE, SIDE)
    masks[0, :, :9], masks[1, 5:] = 1, 1
    wanted = graphs.measure(edited=pair, mask=masks)
    assert graphs.measure(edited=pair, mask=masks[:, None]) == wanted
    assert graphs.measure(edited=pair, mask=masks[..., None].bool()) == wanted
    assert "mask has 2 images but 1 are edited" in refusal(lambda mask: graphs.measure(mask=mask), masks)


def test_bad_masks(graphs: Graphs) -> None:
    """Protects: no node takes a mask that would give garbage."""
    for (node, name), (run, mask) in mask_runs(graphs).items():
        for message, change in BAD_MASKS.items():
            assert f"{title(graphs, node)}: {name} {message}" in refusal(run, change(mask)), message


def test_images(graphs: Graphs) -> None:
    """Protects: every form of an image is the canonical one, to the bit; one channel is grey."""
    grey = graphs.image[..., :1]
    for (node, name), run in image_runs(graphs).items():
        wanted = run(graphs.image)
        assert not same(run(graphs.image * 0.5), wanted), node
        for form, change in IMAGES.items():
            assert same(run(change(graphs.image)), wanted), (node, name, form)
        assert same(run(grey), run(grey.repeat(1, 1, 1, 3))), (node, name)
        assert same(run(grey > 0.5), run((grey > 0.5).float().repeat(1, 1, 1, 3))), (node, name)


def test_bad_images(graphs: Graphs) -> None:
    """Protects: no node shows or measures what is no image."""
    for (node, name), run in image_runs(graphs).items():
        for message, change in BAD_IMAGES.items():
            assert f"{title(graphs, node)}: {name} {message}" in refusal(run, change(graphs.image)), message


def test_bad_latents(graphs: Graphs) -> None:
    """Protects: latents of another rank, family or kind, and broken ones, are named."""
    for (node, name), run in latent_runs(graphs).items():
        half = {"samples": graphs.latent["samples"].half(), "batch_index": [0], "another pack's": object()}
        rounded = {"samples": half["samples"].float()}
        assert same(run(half), run(rounded)), node
        for message, change in BAD_LATENTS.items():
            said = refusal(run, change(graphs.latent["samples"]))
            assert f"{title(graphs, node)}: {name} {message}" in said, message


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(1, 1, SIZE, SIZE) * 255, "has values from 255.0 to 255.0"),
        (torch.ones(SIZE, SIZE) * NAN, "has values that are not finite"),
        (-torch.ones(1, SIZE, SIZE), "has values from -1.0 to -1.0"),
    ],
)
def test_noise_masks(host: Host, graphs: Graphs, mask: torch.Tensor, message: str) -> None:
    """Protects: the sampler refuses a noise mask that would blow the latent up."""
    edit = copy.copy(graphs.edit)
    (edit.noise,) = host.execute("SetLatentNoiseMask", samples=edit.noise, mask=mask)
    said = refusal(lambda _: edit.run(), None)
    assert f"UnifyEdit Sampler: the noise mask in latent_image {message}" in said


def test_a_video_for_the_sampler(host: Host, graphs: Graphs) -> None:
    """Protects: a latent_image of another rank than the inversion's is named."""
    edit = copy.copy(graphs.edit)
    edit.noise = {"samples": edit.noise["samples"][:, :, None].repeat(1, 1, 3, 1, 1)}
    said = refusal(lambda _: edit.run(), None)
    assert "UnifyEdit Sampler: the inversion is of a latent of 16x16 (4 channels)" in said
    assert "shape [4, 3, 16, 16] an image" in said

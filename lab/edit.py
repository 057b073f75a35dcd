"""`python dev.py edit`: run the shipped workflow on a real server, save the images and measure them."""

from __future__ import annotations

import copy
import io
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image, ImageOps

from ..metrics.image import measure
from ..models.tiny_studio import drawing, scenes, studio, words
from ..pictures.contact_sheet import draw_sheet, save_image, to_image
from .edit_options import EditOptions, parse
from .output import write_json
from .server import NodeError, Prompt, Server, ServerError, device_arguments
from .studies.balances import CHOSEN
from .tiny_studio.attribute_classifier import shows

WORKFLOWS = Path(__file__).resolve().parent.parent / "workflows" / "api"
DRAWN, PHOTO = WORKFLOWS / "01 Start here.json", WORKFLOWS / "03 Edit a photo.json"
# The sample scenes: this one of each edit type.
SEED, WORDING = 1, "complex"


@dataclass(frozen=True, eq=False)
class Edited:
    """One edit.

    texts: source and edit description.
    source, edited: [height, width, 3], 0 to 1. mask: [height, width], 1 where the edit happens, or None.
    target: the scene of the true edit, None for the user's image.
    """

    name: str
    texts: tuple[str, str]
    source: torch.Tensor
    edited: torch.Tensor
    mask: torch.Tensor | None
    target: scenes.Scene | None


def set_inputs(prompt: Prompt, class_type: str, **inputs: Any) -> None:
    """Set widgets of every node of a type. Raises LookupError if the workflow has none."""
    found = [node for node in prompt.values() if node["class_type"] == class_type]
    if not found:
        raise LookupError(f"the workflow has no {class_type}")
    for node in found:
        node["inputs"].update(inputs)


def replace_node(prompt: Prompt, node_id: str, outputs: dict[int, Any]) -> None:
    """Remove a node: inputs linked to its output i get `outputs[i]`, or are removed if that is None.

    A node that loses its only input is removed, too.
    """
    del prompt[node_id]
    for key, node in list(prompt.items()):
        for name, value in list(node["inputs"].items()):
            if not isinstance(value, list) or value[0] != node_id:
                continue
            node["inputs"][name] = outputs[value[1]]
            if node["inputs"][name] is None:
                del node["inputs"][name]
                if not node["inputs"]:
                    del prompt[key]


def read_picture(file: Path, mode: str, option: str) -> Image.Image:
    """Read a picture, turned upright; an unreadable one ends the program."""
    try:
        with Image.open(file) as picture:
            return ImageOps.exif_transpose(picture).convert(mode)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        refuse(f"{option}: cannot read {file} as a picture")


def read_pictures(options: EditOptions) -> dict[str, Image.Image]:
    """The user's image and mask, checked; for the Tiny Studio cropped to a square and scaled to its size."""
    pictures = {}
    if options.image is not None:
        pictures["source"] = read_picture(options.image, "RGB", "--image")
    if options.mask is not None:
        mask = pictures["mask"] = read_picture(options.mask, "L", "--mask")
        if mask.size != pictures["source"].size:
            refuse(
                f"--mask: it is {mask.size} and the image is {pictures['source'].size}; make them one size"
            )
        if not mask.getbbox():
            refuse(f"--mask: {options.mask} is black everywhere; paint what may change white")
    if options.checkpoint is not None:
        return pictures
    size = (drawing.SIZE, drawing.SIZE)
    return {name: ImageOps.fit(picture, size, Image.Resampling.LANCZOS) for name, picture in pictures.items()}


def refuse(message: str) -> NoReturn:
    print(f"dev.py edit: {message}", file=sys.stderr)
    raise SystemExit(2)


def warn_of_words(*texts: str) -> None:
    """Name the words that have no effect, because the Tiny Studio does not know them."""
    unknown = words.unknown(" ".join(texts), studio.known_tokens())
    if unknown:
        print(f"dev.py edit: the Tiny Studio does not know: {', '.join(unknown)}", file=sys.stderr)


class ProgressLine:
    """Shows the running node's title and step: one updating line on a terminal, a few lines elsewhere."""

    def __init__(self, prompt: Prompt) -> None:
        self._titles = {
            node["class_type"]: node.get("_meta", {}).get("title", node["class_type"])
            for node in prompt.values()
        }
        self._moves = sys.stdout.isatty()

    def __call__(self, node: str, step: int, steps: int) -> None:
        text = f"  {self._titles[node]} {step}/{steps}" if steps else f"  {self._titles[node]}"
        if self._moves:
            print(f"\r{text:<60}", end="", flush=True)
        elif steps and step in (steps // 2, steps):
            print(text, flush=True)

    def end(self) -> None:
        if self._moves:
            print("\r" + " " * 60 + "\r", end="", flush=True)


def run_samples(server: Server, workflow: Prompt) -> list[Edited]:
    """Edit the sample scenes, one of each edit type."""
    edits = []
    for edit_type in scenes.EDIT_TYPES:
        pair = scenes.sample_edit(edit_type, SEED, WORDING, held=True)
        print(f"{edit_type}: {pair.source_text} -> {pair.edit_text}", flush=True)
        prompt = copy.deepcopy(workflow)
        set_inputs(prompt, "DescEditTinyScene", edit_type=edit_type, seed=SEED, wording=WORDING)
        balance = CHOSEN[edit_type]
        set_inputs(prompt, "DescEditUnify", structure=balance.beta1, words=balance.beta2)
        texts, mask = (pair.source_text, pair.edit_text), pair.mask()
        region = None if mask is None else torch.from_numpy(mask)
        source = torch.from_numpy(pair.source.draw())
        edits.append(Edited(edit_type, texts, source, run_one(server, prompt), region, pair.target))
    return edits


def run_image(
    server: Server, workflow: Prompt, options: EditOptions, pictures: dict[str, Image.Image]
) -> Edited:
    """Edit the user's image."""
    prompt = copy.deepcopy(workflow)
    for name, picture in pictures.items():
        picture.save(server.base / "input" / f"{name}.png")
    scene = next(key for key, node in prompt.items() if node["class_type"] == "DescEditTinyScene")
    prompt["source"] = {"class_type": "LoadImage", "inputs": {"image": "source.png"}}
    if "mask" in pictures:
        prompt["mask"] = {"class_type": "LoadImageMask", "inputs": {"image": "mask.png", "channel": "red"}}
    links = {
        "source": ["source", 0],
        "edited": None,
        "mask": ["mask", 0] if "mask" in pictures else None,
        "source_description": options.source,
        "edit_description": options.edit,
    }
    names = server.object_info()["DescEditTinyScene"]["output_name"]
    replace_node(prompt, scene, {index: links[name] for index, name in enumerate(names)})
    print(f"{options.image}: {options.source} -> {options.edit}", flush=True)
    arrays = {name: torch.from_numpy(_values(picture)) for name, picture in pictures.items()}
    texts = (options.source, options.edit)
    return Edited("picture", texts, arrays["source"], run_one(server, prompt), arrays.get("mask"), None)


def run_photo(
    server: Server, workflow: Prompt, options: EditOptions, pictures: dict[str, Image.Image]
) -> Edited:
    """Edit the user's image at full size with the user's checkpoint."""
    assert options.checkpoint is not None
    prompt = copy.deepcopy(workflow)
    folder = server.base / "models" / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    there = folder / options.checkpoint.name
    try:
        os.link(options.checkpoint.resolve(), there)
    except OSError:  # another disk
        shutil.copyfile(options.checkpoint, there)
    for name, picture in pictures.items():
        picture.save(server.base / "input" / f"{name}.png")
    set_inputs(prompt, "CheckpointLoaderSimple", ckpt_name=options.checkpoint.name)
    set_inputs(prompt, "LoadImage", image="source.png")
    set_inputs(prompt, "DescEditDescribe", source_description=options.source, edit_description=options.edit)
    if "mask" in pictures:
        prompt["mask"] = {"class_type": "LoadImageMask", "inputs": {"image": "mask.png", "channel": "red"}}
        set_inputs(prompt, "DescEditCrop", mask=["mask", 0])
    print(f"{options.image}: {options.source} -> {options.edit}", flush=True)
    arrays = {name: torch.from_numpy(_values(picture)) for name, picture in pictures.items()}
    texts = (options.source, options.edit)
    return Edited("picture", texts, arrays["source"], run_one(server, prompt), arrays.get("mask"), None)


def run_one(server: Server, prompt: Prompt) -> torch.Tensor:
    """The image that the workflow's SaveImage wrote."""
    progress = ProgressLine(prompt)
    try:
        outputs = server.run(prompt, progress)
    finally:
        progress.end()
    saved = next(key for key, node in prompt.items() if node["class_type"] == "SaveImage")
    with Image.open(io.BytesIO(server.image(outputs[saved]["images"][0]))) as picture:
        return torch.from_numpy(_values(picture.convert("RGB")))


def _values(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture, np.float32) / 255


def psnr_outside(edit: Edited) -> float | None:
    """PSNR in dB against the source where the mask is black, at most 100; None if nothing is."""
    if edit.mask is None or bool((edit.mask > 0).all()):
        return None
    region = (edit.mask > 0).float()[None]
    return measure(edit.edited[None], edit.source[None], region)["psnr_outside"].item()


def save_pictures(edits: Sequence[Edited], out: Path) -> dict[str, str]:
    """Write source and edited image of each edit and an overview; returns the paths by name."""
    paths = {}
    for edit in edits:
        for kind, pixels in (("source", edit.source), ("edited", edit.edited)):
            file = out / f"{edit.name}-{kind}.png"
            save_image(to_image(pixels), file)
            paths[f"{edit.name}_{kind}"] = str(file)
    columns = [("source", [edit.source for edit in edits]), ("edited", [edit.edited for edit in edits])]
    targets = [torch.from_numpy(edit.target.draw()) for edit in edits if edit.target is not None]
    columns += [("true edit", targets)] if targets else []
    captions = [[*edit.texts, ""][: len(columns)] for edit in edits]
    overview = out / "overview.png"
    save_image(to_image(draw_sheet(columns, drawing.SIZE, captions)[0]), overview)
    return {**paths, "overview": str(overview)}


def report(edits: Sequence[Edited]) -> dict[str, float | None]:
    """Print a line for each edit that is measured; returns the means, None where nothing is measured."""
    pictures = [(edit.edited, edit.target) for edit in edits if edit.target is not None]
    success = shows(torch.stack([p for p, _ in pictures]), [t for _, t in pictures]) if pictures else []
    kept = [psnr_outside(edit) for edit in edits]
    measured = [decibel for decibel in kept if decibel is not None]
    for edit, decibel, made in zip(edits, kept, success or [None] * len(edits), strict=True):
        cells = [] if made is None else ["edit made" if made else "edit not made"]
        cells += [] if decibel is None else [f"{decibel:.1f} dB kept outside the mask"]
        if cells:
            print(f"{edit.name:<14}{', '.join(cells)}")
    return {
        "source_psnr_outside_mask_db": round(sum(measured) / len(measured), 2) if measured else None,
        "edit_success": sum(success) / len(success) if success else None,
    }


def main(arguments: Sequence[str]) -> int:
    """Run the edits; 0, or 1 if the server or a node failed."""
    options = parse(arguments)
    pictures = read_pictures(options)
    workflow = json.loads((DRAWN if options.checkpoint is None else PHOTO).read_text(encoding="utf-8"))
    if options.checkpoint is None:
        warn_of_words(options.source, options.edit)
    print("starting ComfyUI ...", flush=True)
    try:
        with Server(Path(os.environ["COMFYUI_PATH"]), device_arguments()) as server:
            if options.checkpoint is not None:
                edits = [run_photo(server, workflow, options, pictures)]
            elif pictures:
                edits = [run_image(server, workflow, options, pictures)]
            else:
                edits = run_samples(server, workflow)
    except NodeError as error:
        print(f"dev.py edit: ComfyUI reports an error in {error}", file=sys.stderr)
        return 1
    except ServerError as error:
        print(f"dev.py edit: {error}", file=sys.stderr)
        return 1
    metrics = report(edits)
    paths = save_pictures(edits, options.out)
    for name, value in metrics.items():
        if value is not None:
            print(f"{name}: {value}")
    for path in paths.values():
        print(path)
    write_json(options.json, {**metrics, **paths})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

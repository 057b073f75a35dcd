"""`python dev.py edit`: run the shipped workflow on a real server, save the images and measure them."""

from __future__ import annotations

import copy
import io
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from PIL import Image, ImageOps

from ..models.tiny_studio import drawing, scenes
from .edit_options import EditOptions, parse
from .server import NodeError, Prompt, Server, ServerError, device_arguments
from .studies.balances import CHOSEN
from .tiny_studio import attribute_classifier

WORKFLOW = Path(__file__).resolve().parent.parent / "workflows" / "api" / "UnifyEdit - start here.json"
# The sample scenes: this one of each edit type.
SEED, WORDING = 1, "complex"


@dataclass(frozen=True)
class Edited:
    """One edit that ran: pictures in 0..1 of shape [128, 128, 3], the mask in 0..1 or None."""

    name: str
    source: np.ndarray
    edited: np.ndarray
    mask: np.ndarray | None
    pair: scenes.EditPair | None


def set_inputs(prompt: Prompt, class_type: str, **inputs: Any) -> None:
    """Set widgets of every node of a type; the workflow must have one."""
    found = [node for node in prompt.values() if node["class_type"] == class_type]
    if not found:
        raise LookupError(f"the workflow has no {class_type}")
    for node in found:
        node["inputs"].update(inputs)


def replace_node(prompt: Prompt, node_id: str, outputs: dict[int, Any]) -> None:
    """Remove a node from a prompt: an input that read its output i gets `outputs[i]`, or is removed if that
    is None.

    A node that loses its only input is removed too.
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
    """The user's image and mask, checked, cropped to a square and scaled to the Tiny Studio's size."""
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
    size = (drawing.SIZE, drawing.SIZE)
    return {name: ImageOps.fit(picture, size, Image.Resampling.LANCZOS) for name, picture in pictures.items()}


def refuse(message: str) -> NoReturn:
    print(f"dev.py edit: {message}", file=sys.stderr)
    raise SystemExit(2)


class ProgressLine:
    """Shows which node runs and its progress: one updating line on a terminal, a few lines elsewhere."""

    def __init__(self) -> None:
        self._moves = sys.stdout.isatty()

    def __call__(self, node: str, step: int, steps: int) -> None:
        text = f"  {node} {step}/{steps}" if steps else f"  {node}"
        if self._moves:
            print(f"\r{text:<60}", end="", flush=True)
        elif steps and step in (steps // 2, steps):
            print(text, flush=True)

    def end(self) -> None:
        if self._moves:
            print("\r" + " " * 60 + "\r", end="", flush=True)


def result(server: Server, prompt: Prompt, outputs: dict[str, Any]) -> np.ndarray:
    """The image that the workflow's SaveImage wrote."""
    for node_id, output in outputs.items():
        if prompt[node_id]["class_type"] == "SaveImage":
            with Image.open(io.BytesIO(server.image(output["images"][0]))) as picture:
                return np.asarray(picture.convert("RGB"), np.float32) / 255
    raise LookupError("the workflow saved no picture")


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
        edited = run_one(server, prompt)
        edits.append(Edited(edit_type, pair.source.draw(), edited, pair.mask(), pair))
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
    edited = run_one(server, prompt)
    arrays = {name: np.asarray(picture, np.float32) / 255 for name, picture in pictures.items()}
    return Edited("picture", arrays["source"], edited, arrays.get("mask"), None)


def run_one(server: Server, prompt: Prompt) -> np.ndarray:
    progress = ProgressLine()
    try:
        outputs = server.run(prompt, progress)
    finally:
        progress.end()
    return result(server, prompt, outputs)


def psnr_outside(edit: Edited) -> float | None:
    """PSNR in dB of the edited image against the source where the mask is black, at most 100."""
    keep = np.ones(edit.source.shape[:2], bool) if edit.mask is None else edit.mask <= 0
    if not keep.any():
        return None
    error = float(np.mean((edit.source[keep] - edit.edited[keep]) ** 2))
    return -10 * math.log10(max(error, 1e-10))


def succeeded(edits: Sequence[Edited]) -> list[bool]:
    """Whether the classifier reads what should have changed as changed, and everything else as it was."""
    read = attribute_classifier.load().read(np.stack([edit.edited for edit in edits]))
    wanted = [edit.pair.target.values for edit in edits if edit.pair is not None]
    return [
        all(seen.get(name) == value for name, value in values.items())
        for seen, values in zip(read, wanted, strict=True)
    ]


def save_pictures(edits: Sequence[Edited], out: Path) -> dict[str, str]:
    """Write source and edited image of each edit and an overview; returns the paths by name."""
    out.mkdir(parents=True, exist_ok=True)
    paths, rows = {}, []
    for edit in edits:
        columns = {"source": edit.source, "edited": edit.edited}
        for kind, pixels in columns.items():
            file = out / f"{edit.name}-{kind}.png"
            as_image(pixels).save(file)
            paths[f"{edit.name}_{kind}"] = str(file)
        if edit.pair is not None:
            columns["true"] = edit.pair.target.draw()
        rows.append(
            np.concatenate(
                [np.pad(c, ((4, 4), (4, 4), (0, 0)), constant_values=1) for c in columns.values()], 1
            )
        )
    overview = out / "overview.png"
    as_image(np.concatenate(rows)).save(overview)
    return {**paths, "overview": str(overview)}


def as_image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray((np.clip(pixels, 0, 1) * 255).round().astype(np.uint8))


def report(edits: Sequence[Edited]) -> dict[str, float | None]:
    """Print a line for each edit; returns the figures over all, None where there is nothing to measure."""
    known = [edit for edit in edits if edit.pair is not None]
    success = dict(zip((edit.name for edit in known), succeeded(known), strict=True)) if known else {}
    # A change of style has no mask: nothing must stay the same.
    kept = {edit.name: psnr_outside(edit) for edit in edits if edit.mask is not None or edit.pair is None}
    print(f"{'edit':<14}{'kept outside mask':>20}{'edit made':>14}")
    for edit in edits:
        decibel = kept.get(edit.name)
        made = {True: "yes", False: "no", None: "not checked"}[success.get(edit.name)]
        print(f"{edit.name:<14}{'-' if decibel is None else f'{decibel:.1f} dB':>20}{made:>14}")
    measured = [decibel for decibel in kept.values() if decibel is not None]
    return {
        "source_psnr_outside_mask_db": round(sum(measured) / len(measured), 2) if measured else None,
        "edit_success": sum(success.values()) / len(success) if success else None,
    }


def main(arguments: Sequence[str]) -> int:
    """Run the edits; 0, or 1 if the server or a node failed."""
    options = parse(arguments)
    pictures = read_pictures(options)
    workflow = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    print("starting ComfyUI ...", flush=True)
    try:
        with Server(Path(os.environ["COMFYUI_PATH"]), device_arguments()) as server:
            if pictures:
                edits = [run_image(server, workflow, options, pictures)]
            else:
                edits = run_samples(server, workflow)
    except NodeError as error:
        print(f"dev.py edit: ComfyUI reports an error in {error}", file=sys.stderr)
        return 1
    except ServerError as error:
        print(f"dev.py edit: {error}", file=sys.stderr)
        return 1
    figures = report(edits)
    paths = save_pictures(edits, options.out)
    for name, value in figures.items():
        print(f"{name}: {'not checked' if value is None else value}")
    for path in paths.values():
        print(path)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**figures, **paths}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

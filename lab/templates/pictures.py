"""The templates' pictures: square, at each template's own settings, from a real server.

What cannot run here, for want of a checkpoint, is drawn with the Tiny Studio in its place on a drawn scene,
and the picture says so.
"""

from __future__ import annotations

import copy
import io
import shutil
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from ...models.tiny_studio import drawing, scenes, studio
from ...pictures.contact_sheet import save_image
from ...pictures.lettering import Lettering
from ..server import Prompt, Server
from .shared import BRIDGE, FLUX_BRIDGE

SIDE = 512
SHOWN = 800
STANDIN = "drawn with the Tiny Studio"
# Nodes that are left out with the Tiny Studio, and which input each output passes on.
PASSED = {
    "LoraLoader": ("model", "clip"),
    "ControlNetApplyAdvanced": ("positive", "negative"),
    "IPAdapterUnifiedLoader": ("model", "model"),
    "IPAdapter": ("model",),
}
UNUSED = {"ControlNetLoader", "Canny", "CLIPLoader", "TextGenerate", "DescEditDescribePrompt"}
EDITS = {"04": "face", "11": "background"}  # what a template edits, where not a colour

# A picture of the help pages: what a node of a template shows after a run.
HELP = {
    "balance": ("12", "DescEditAdaptiveScheduler"),
    "compare_unify": ("12", "DescEditCompare"),
    "guidance_grid": ("02", "DescEditGuidanceGrid"),
    "losses": ("01", "DescEditUnify"),
    "maps": ("12", "DescEditAttentionMaps"),
    "schedule": ("schedule", "DescEditGuidanceSchedule"),
}
SCHEDULE: Prompt = {
    "1": {
        "class_type": "DescEditGuidanceSchedule",
        "inputs": {
            "image_low": 1.0,
            "image_high": 2.0,
            "image_shape": "rising",
            "text_low": 3.0,
            "text_high": 7.5,
            "text_shape": "falling",
        },
    },
    "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 1]}},
}


def draw(server: Server, name: str, graphs: dict[str, Prompt], file: Path) -> None:
    """Draw a template's picture.

    graphs: of all templates, by name, as the API takes them.
    """
    number = name[:2]
    prompt = graphs[name]
    if number == "06":
        picture = _pairs()
    elif number == "08":
        (twin,) = [other for key, other in graphs.items() if key.startswith("07")]
        picture = _of(server, twin, "DescEditTrainBridge")
    elif number in ("02", "07", "12"):
        kind = "DescEditGuidanceGrid" if number == "02" else "DescEditCompare"
        picture = _of(server, prompt, kind)
    elif number in ("01", "16"):
        picture = _split(server, prompt)
    else:
        picture = _labelled(_split(server, _standin(server, prompt, EDITS.get(number, "colour"))))
    save_image(picture, file)


def draw_help(server: Server, graphs: dict[str, Prompt], folder: Path) -> None:
    """Draw the help pages' pictures of what nodes show. graphs: as in `draw`."""
    prompts = {"schedule": SCHEDULE, **{name[:2]: prompt for name, prompt in graphs.items()}}
    outputs = {number: _run(server, prompts[number]) for number in {number for number, _ in HELP.values()}}
    for file, (number, kind) in HELP.items():
        (key,) = [key for key, node in prompts[number].items() if node["class_type"] == kind]
        shown = [_read(server, entry) for entry in outputs[number][key]["images"]]
        height = max(picture.height for picture in shown)
        shown = [ImageOps.contain(picture, (SHOWN, height), Image.Resampling.LANCZOS) for picture in shown]
        row = Image.new("RGB", (sum(picture.width for picture in shown), height), "white")
        left = 0
        for picture in shown:
            row.paste(picture, (left, 0))
            left += picture.width
        save_image(row, folder / f"{file}.jpg")


def _run(server: Server, prompt: Prompt) -> dict[str, dict[str, list[dict[str, str]]]]:
    return server.run(copy.deepcopy(prompt))


def _read(server: Server, entry: dict[str, str]) -> Image.Image:
    with Image.open(io.BytesIO(server.image(entry))) as picture:
        return picture.convert("RGB")


def _of(server: Server, prompt: Prompt, kind: str) -> Image.Image:
    """The picture that a node of a type shows, in the middle of a square."""
    (key,) = [key for key, node in prompt.items() if node["class_type"] == kind]
    shown = _read(server, _run(server, prompt)[key]["images"][0])
    if shown.width > 3 * shown.height:  # four pictures in a row: two and two
        half = shown.width // 2
        stacked = Image.new("RGB", (half, 2 * shown.height), "white")
        for row in range(2):
            stacked.paste(
                shown.crop((row * half, 0, (row + 1) * half, shown.height)), (0, row * shown.height)
            )
        shown = stacked
    scale = SIDE / max(shown.size)
    size = (round(shown.width * scale), round(shown.height * scale))
    shown = shown.resize(size, Image.Resampling.LANCZOS)
    square = Image.new("RGB", (SIDE, SIDE), shown.getpixel((0, 0)))
    square.paste(shown, ((SIDE - shown.width) // 2, (SIDE - shown.height) // 2))
    return square


def _split(server: Server, prompt: Prompt) -> Image.Image:
    """What the slider shows: the left half before, the right half after."""
    (key,) = [key for key, node in prompt.items() if node["class_type"] == "ImageCompare"]
    outputs = _run(server, prompt)[key]
    before, after = (
        _read(server, outputs[f"{side}_images"][0]).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        for side in "ab"
    )
    after.paste(before.crop((0, 0, SIDE // 2, SIDE)), (0, 0))
    ImageDraw.Draw(after).line([(SIDE // 2, 0), (SIDE // 2, SIDE)], fill="white", width=4)
    return after


def _labelled(picture: Image.Image) -> Image.Image:
    """With a band that says what drew it."""
    lettering = Lettering(26)
    pen = ImageDraw.Draw(picture)
    pen.rectangle((0, SIDE - 44, SIDE, SIDE), fill="white")
    lettering.draw(pen, (16, SIDE - 40), STANDIN)
    return picture


def _standin(server: Server, prompt: Prompt, edit_type: str) -> Prompt:
    """The graph with the Tiny Studio for its checkpoint and a drawn scene for its photo and descriptions."""
    made = copy.deepcopy(prompt)
    pair = scenes.sample_edit(edit_type, 8, "complex", held=True)
    stream = io.BytesIO()
    Image.fromarray((pair.source.draw() * 255).astype(np.uint8)).save(stream, "png")
    uploaded = server.upload(stream.getvalue(), f"{edit_type}.png")
    folder = server.base / "models" / "attention_bridges"
    folder.mkdir(parents=True, exist_ok=True)
    for bridge in (BRIDGE, FLUX_BRIDGE):
        shutil.copy(studio.BRIDGE, folder / bridge)
    for node in list(made.values()):
        inputs = node["inputs"]
        match node["class_type"]:
            case "CheckpointLoaderSimple":
                node["class_type"], node["inputs"] = "DescEditTinyStudio", {}
            case "LoadImage":
                inputs["image"] = uploaded
            case "DescEditCrop":
                inputs["side"] = drawing.SIZE
            case "DescEditDescribe":
                for old in ("source_text", "edit_text"):
                    inputs.pop(old, None)
                inputs.update(source_description=pair.source_text, edit_description=pair.edit_text)
    for key, node in list(made.items()):
        if node["class_type"] in PASSED:
            _leave_out(made, key, PASSED[node["class_type"]])
    return {key: node for key, node in made.items() if node["class_type"] not in UNUSED}


def _leave_out(prompt: Prompt, key: str, passed: tuple[str, ...]) -> None:
    """Take a node out of a graph: what its outputs fed gets the inputs that they pass on."""
    removed = prompt.pop(key)["inputs"]
    for node in prompt.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list) and value[0] == key:
                node["inputs"][name] = removed[passed[value[1]]]


def _pairs() -> Image.Image:
    """Two drawn pairs, one below the other."""
    square = Image.new("RGB", (SIDE, SIDE), "white")
    half = SIDE // 2
    for row, edit_type in enumerate(("background", "object")):
        pair = scenes.sample_edit(edit_type, 3, "complex", held=True)
        for column, scene in enumerate((pair.source, pair.target)):
            drawn = Image.fromarray((scene.draw() * 255).astype(np.uint8))
            drawn = drawn.resize((half - 8, half - 8), Image.Resampling.LANCZOS)
            square.paste(drawn, (4 + column * half, 4 + row * half))
    return square

"""Benchmarks in every layout, on miniature copies of them, and cases and methods that cannot be used."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from host import Host
from PIL import Image

RED, BLUE = (200, 30, 20), (20, 30, 200)
WORKFLOW = {
    "1": {"class_type": "LoadImage", "inputs": {"image": ""}},
    "2": {"class_type": "ImageInvert", "inputs": {"image": ["1", 0]}},
    "3": {"class_type": "PrimitiveString", "inputs": {"value": ""}},
    "4": {"class_type": "PreviewImage", "inputs": {"images": ["2", 0]}},
}
SLOTS = {"source_image": "1.image", "edit_description": "3.value", "output": "4"}


@pytest.fixture
def layouts(host: Host) -> Any:
    """The module."""
    return host.pack_module("lab.benchmark.layouts")


@pytest.fixture
def methods(host: Host) -> Any:
    """The module."""
    return host.pack_module("lab.benchmark.methods")


def paint(path: Path, colour: Any = RED, mode: str = "RGB", size: tuple[int, int] = (48, 40)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_cases(folder: Path, *cases: dict[str, Any]) -> None:
    """A benchmark folder of these cases, each with defaults for what it leaves out."""
    paint(folder / "source.png")
    lines = []
    for case in cases:
        values = {"type": "colour", "source_image": "source.png", "source_description": "a red wall"}
        lines.append(json.dumps({**values, "edit_description": "a blue wall", **case}))
    (folder / "cases.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def colour(case: Any, role: str) -> tuple[int, ...]:
    return case.read(role).getpixel((3, 3))


def texts(case: Any) -> tuple[str, str, str]:
    return case.source_description, case.edit_description, case.instruction


def test_folder(layouts: Any, tmp_path: Path) -> None:
    """Protects: our own format gives every field, and leaves out what a case has not."""
    paint(tmp_path / "target.png", BLUE)
    paint(tmp_path / "mask.png", 255, "L")
    extra = {"mask": "mask.png", "target_image": "target.png", "instruction": "make it blue"}
    write_cases(tmp_path, {"id": "a"}, {"id": "b", "type": "style", **extra})
    first, second = layouts.read_cases("folder", tmp_path, "test")
    assert (first.id, first.edit_type, second.edit_type) == ("a", "colour", "style")
    assert texts(second) == ("a red wall", "a blue wall", "make it blue")
    assert first.read("mask") is None
    assert first.read("target_image") is None
    assert (colour(second, "source_image"), colour(second, "target_image")) == (RED, BLUE)
    assert second.read("mask").getpixel((0, 0)) == 255
    assert first.seed != second.seed


def test_emu_edit(layouts: Any, tmp_path: Path) -> None:
    """Protects: the Emu Edit test set's parquet files, with captions, tasks and encoded pictures."""
    datasets = importlib.import_module("datasets")
    encoded = {"bytes": paint(tmp_path / "picture.png").read_bytes(), "path": None}
    columns = {
        "instruction": ["make it blue", "remove it"],
        "image": [encoded, encoded],
        "task": ["local", "remove"],
        "split": ["test", "test"],
        "idx": [4, 4],
        "hash": ["x", "y"],
        "input_caption": ["a red wall", "a wall"],
        "output_caption": ["a blue wall", "nothing"],
    }
    rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    rows.to_parquet(str(tmp_path / "set" / "data" / "test-00000-of-00001.parquet"))
    first, second = layouts.read_cases("emu-edit", tmp_path / "set", "test")
    assert texts(first) == ("a red wall", "a blue wall", "make it blue")
    assert (first.edit_type, second.edit_type) == ("local", "remove")
    assert colour(first, "source_image") == RED
    with pytest.raises(ValueError, match="validation"):
        layouts.read_cases("emu-edit", tmp_path / "set", "validation")


def test_dataset(layouts: Any, tmp_path: Path) -> None:
    """Protects: a data set that was saved to disk, in our own names, with a picture that one row lacks."""
    datasets = importlib.import_module("datasets")
    path = str(paint(tmp_path / "picture.png"))
    columns = {
        "id": ["a", "b"],
        "type": ["colour", "style"],
        "source_image": [path, path],
        "source_description": ["a red wall"] * 2,
        "edit_description": ["a blue wall"] * 2,
        "target_image": [str(paint(tmp_path / "target.png", BLUE)), None],
    }
    rows = datasets.Dataset.from_dict(columns)
    for name in ("source_image", "target_image"):
        rows = rows.cast_column(name, datasets.Image())
    rows.save_to_disk(str(tmp_path / "set"))
    first, second = layouts.read_cases("dataset", tmp_path / "set", "test")
    assert colour(first, "target_image") == BLUE
    assert second.read("target_image") is None
    assert second.edit_type == "style"


def test_magicbrush(layouts: Any, tmp_path: Path) -> None:
    """Protects: every turn is a case, from the true picture before it; the mask is its transparent part."""
    folder = tmp_path / "test" / "images" / "30"
    for name, shade in (("30-input.png", RED), ("30-output1.png", BLUE), ("30-output2.png", (1, 2, 3))):
        paint(folder / name, shade)
    holed = Image.new("RGBA", (24, 16), (*RED, 255))
    holed.paste((0, 0, 0, 0), (12, 0, 24, 16))
    holed.save(folder / "30-mask1.png")
    paint(folder / "30-mask2.png", 255, "L")
    turns = [
        {"input": "30-input.png", "mask": "30-mask1.png", "output": "30-output1.png", "instruction": "blue"},
        {
            "input": "30-output1.png",
            "mask": "30-mask2.png",
            "output": "30-output2.png",
            "instruction": "dark",
        },
    ]
    write(tmp_path / "test" / "edit_sessions.json", {"30": turns})
    described = {"30-input.png": "red", "30-output1.png": "a blue one", "30-output2.png": "a dark one"}
    write(tmp_path / "test" / "global_descriptions.json", {"30": described})
    first, second = layouts.read_cases("magicbrush", tmp_path, "test")
    assert (first.id, second.id, second.edit_type) == ("30-1", "30-2", "turn 2")
    assert texts(second) == ("a blue one", "a dark one", "dark")
    assert colour(second, "source_image") == colour(first, "target_image") == BLUE
    mask = np.asarray(first.read("mask"))
    assert (mask[:, :12] == 0).all()
    assert (mask[:, 12:] == 255).all()
    assert second.read("mask").getextrema() == (255, 255)


def test_pie_bench(layouts: Any, tmp_path: Path) -> None:
    """Protects: brackets go, runs become a mask with its edge, types are named, and paths are resolved."""
    paint(tmp_path / "annotation_images" / "6_change_attribute_color_40" / "1.jpg", size=(512, 512))
    entry = {
        "image_path": "6_change_attribute_color_40/1.jpg",
        "original_prompt": "a [red] wall",
        "editing_prompt": "a [blue] wall",
        "editing_instruction": "Make the wall [blue]",
        "editing_type_id": "6",
        "blended_word": "red blue",
        "mask": [512 * 100 + 50, 7, 512 * 101 + 50, 7],
    }
    write(tmp_path / "mapping_file.json", {"600000000000": entry})
    (case,) = layouts.read_cases("pie-bench", tmp_path, "test")
    assert texts(case) == ("a red wall", "a blue wall", "Make the wall blue")
    assert case.edit_type == "6 change colour"
    expected = np.zeros((512, 512), np.uint8)
    expected[100:102, 50:57] = 255
    expected[0] = expected[511] = 255
    expected[:, 0] = expected[:, 511] = 255
    assert np.array_equal(np.asarray(case.read("mask")), expected)
    assert case.read("source_image").size == (512, 512)


def test_unify_bench(layouts: Any, tmp_path: Path) -> None:
    """Protects: a folder a group, two prompts a picture, and no mask where it says None."""
    paint(tmp_path / "color_sim" / "1.png")
    paint(tmp_path / "color_sim" / "1_mask.png", 255, "L")
    paint(tmp_path / "style" / "1.png", BLUE)
    prompts = {"source_prompt": "a red wall", "target_prompt": "a blue wall"}
    write(tmp_path / "color_sim" / "prompts.json", {"1.png": {**prompts, "mask": "1_mask.png"}})
    write(tmp_path / "style" / "prompts.json", {"1.png": {**prompts, "mask": "None"}})
    first, second = layouts.read_cases("unify-bench", tmp_path, "test")
    assert [first.id, second.id] == ["color_sim/1", "style/1"]
    assert texts(first) == ("a red wall", "a blue wall", "")
    assert first.read("mask").getpixel((0, 0)) == 255
    assert second.read("mask") is None
    assert colour(second, "source_image") == BLUE


def test_tiny_studio(layouts: Any, host: Host) -> None:
    """Protects: the Tiny Studio's cases are its held-out edits, with true edits and masks; tuning cases have
    no combination that is held out; another split is refused.
    """
    cases = layouts.read_cases("tiny-studio", None, "test")
    scenes = host.pack_module("models.tiny_studio.scenes")
    assert len(cases) == 50 * len(scenes.EDIT_TYPES)
    (case,) = [case for case in cases if case.id == "texture-007"]
    pair = scenes.sample_edit("texture", 7, "complex", held=True)
    assert texts(case)[:2] == (pair.source_text, pair.edit_text)
    target = np.asarray(case.read("target_image"), np.float32) / 255
    assert np.abs(target - pair.target.draw()).max() <= 0.5 / 255 + 1e-6
    assert np.array_equal(np.asarray(case.read("mask")) > 0, pair.mask() > 0)
    assert case.drawn.pair == pair
    assert all(scenes.held_out(case.drawn.pair.target) for case in cases)
    tuning = [case.drawn.pair for case in layouts.read_cases("tiny-studio", None, "tuning")]
    assert len(tuning) == len(set(map(repr, tuning))) == 60 * len(scenes.EDIT_TYPES)
    assert not any(scenes.held_out(scene) for pair in tuning for scene in (pair.source, pair.target))
    with pytest.raises(ValueError, match="splits test and tuning, not 'dev'"):
        layouts.read_cases("tiny-studio", None, "dev")


def test_two_objects(layouts: Any, host: Host) -> None:
    """Protects the seventh set of scenes: one object changes in one attribute and the mask covers it, the
    other stays as it is; test cases are held out, tuning cases are not.
    """
    scenes = host.pack_module("models.tiny_studio.scenes")
    for split, count in (("test", 100), ("tuning", 20)):
        cases = layouts.read_cases("tiny-studio-two", None, split)
        assert len(cases) == count
        for case in cases:
            pair = case.drawn.pair
            ((name, value),) = pair.changed.items()
            side, _, attribute = name.partition("_")
            assert attribute in ("shape", "colour", "texture")
            assert scenes.held_out(pair.target) == (split == "test")
            assert value in case.edit_description.split() or (attribute, value) == ("texture", "plain")
            changed = np.abs(pair.source.draw() - pair.target.draw()).max(-1) > 1e-3
            columns = np.flatnonzero(changed.any(0))
            assert columns.max() < 67 if side == "left" else columns.min() >= 61  # of 128
            assert (np.asarray(case.read("mask")) > 0)[changed].all()


def test_two_cases_with_one_id(layouts: Any, tmp_path: Path) -> None:
    """Protects: an id that two cases have is refused, and both are named."""
    write_cases(tmp_path, {"id": "a"}, {"id": "b"}, {"id": "a"})
    with pytest.raises(ValueError, match=r"'a': cases\.jsonl line 1 and cases\.jsonl line 3"):
        layouts.read_cases("folder", tmp_path, "test")


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ({"id": "a", "source_description": ""}, "line 1: the case lacks source_description"),
        ({"id": "a", "color": "red"}, "line 1: the case has color"),
        ({"id": "a", "edit_description": 3}, "line 1: edit_description is not a text"),
        ({"id": "a", "source_image": "../secret.png"}, "leads out"),
        ({"id": "a", "mask": "/etc/passwd"}, "leads out"),
    ],
)
def test_bad_case(layouts: Any, tmp_path: Path, case: dict[str, Any], message: str) -> None:
    """Protects: a line that is no case is refused, and the message says where and what."""
    write_cases(tmp_path, case)
    with pytest.raises(ValueError, match=message):
        layouts.read_cases("folder", tmp_path, "test")


def test_missing_picture(layouts: Any, host: Host, tmp_path: Path) -> None:
    """Protects: a picture that is missing or broken is an error of its case that names both."""
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nothing")
    write_cases(tmp_path, {"id": "a", "source_image": "gone.png"}, {"id": "b", "source_image": "broken.png"})
    gone, broken = layouts.read_cases("folder", tmp_path, "test")
    error = host.pack_module("lab.benchmark.cases").CaseError
    with pytest.raises(error, match=r"case a .* source_image gone\.png is missing"):
        gone.read("source_image")
    with pytest.raises(error, match=r"case b .* source_image broken\.png cannot be read"):
        broken.read("source_image")


def write_method(folder: Path, **changes: Any) -> Path:
    write(folder / "workflow.json", WORKFLOW)
    write(folder / "method.json", {"name": "m", "workflow": "workflow.json", "slots": SLOTS, **changes})
    return folder / "method.json"


def test_method_is_filled(layouts: Any, methods: Any, tmp_path: Path) -> None:
    """Protects: a case goes into all inputs of its slots, settings get values, and a sweep makes methods."""
    slots = {**SLOTS, "edit_description": ["3.value", "2.image"], "mask": "4.images", "level": "1.image"}
    write_cases(tmp_path, {"id": "a"})
    (case,) = layouts.read_cases("folder", tmp_path, "test")
    low, high = methods.read_methods([write_method(tmp_path, slots=slots, sweep={"level": [0.5, 2]})])
    assert (low.label, high.label, high.swept) == ("m level=0.5", "m level=2", ("level", 2.0))
    assert low.prompt["1"]["inputs"]["image"] == 0.5
    assert low.digest != high.digest
    prompt = high.fill(case, {"source_image": "x.png", "mask": "y.png"})
    assert prompt["1"]["inputs"]["image"] == "x.png"
    assert prompt["3"]["inputs"]["value"] == prompt["2"]["inputs"]["image"] == "a blue wall"
    assert prompt["4"]["inputs"]["images"] == "y.png"
    assert high.prompt["3"]["inputs"]["value"] == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slots": {**SLOTS, "speed": "2.image"}}, "unknown slot speed: .*source_image, mask, .*output"),
        ({"slots": {**SLOTS, "mask": "9.image"}}, r"slot mask: no node '9'; there are 1 \(LoadImage\)"),
        ({"slots": {**SLOTS, "mask": "1.mask"}}, "node 1, LoadImage, has no input 'mask' but image"),
        ({"slots": {**SLOTS, "output": "7"}}, "slot output: no node '7'"),
        ({"slots": {"source_image": "1.image", "output": "4"}}, "edit_description or instruction are needed"),
        ({"values": {"steps": 3}}, "steps has a value but is no slot"),
        ({"sweep": {"edit_description": [1]}}, "edit_description has a value but is no slot of a setting"),
        ({"slots": {**SLOTS, "level": "2.image"}, "sweep": {"level": ["a"]}}, "list of numbers"),
        ({"workflow": "nothing.json"}, r"nothing\.json cannot be read"),
        ({"speed": 3}, "this has .*speed"),
    ],
)
def test_bad_method(methods: Any, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """Protects: unknown, missing and misplaced slots are refused, and the message lists what there is."""
    with pytest.raises(ValueError, match=message):
        methods.read_methods([write_method(tmp_path, **changes)])


def test_page_workflow_is_refused(methods: Any, tmp_path: Path) -> None:
    """Protects: a workflow saved in the page's own format is refused, and the message says what to do."""
    file = write_method(tmp_path)
    write(tmp_path / "workflow.json", {"nodes": [], "links": []})
    with pytest.raises(ValueError, match=r"Export \(API\)"):
        methods.read_methods([file])


def test_shipped_methods(methods: Any, host: Host) -> None:
    """Protects: the methods that ship fit their workflows, and their nodes and inputs are there."""
    folder = Path(methods.__file__).parent / "tiny"
    files = [file for file in sorted(folder.glob("*.json")) if not file.name.endswith(".api.json")]
    found = methods.read_methods(files)
    assert {method.name for method in found} == {"bridge", "image-to-image", "UnifyEdit"}
    for method in found:
        for node in method.prompt.values():
            offered = host.node(node["class_type"]).INPUT_TYPES()
            names = {name for group in ("required", "optional") for name in offered.get(group, {})}
            assert set(node["inputs"]) <= names

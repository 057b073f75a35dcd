"""Methods of a benchmark. A workflow becomes one by a method file, which says where a case goes in.

A method file names the inputs of nodes, `NODE.INPUT`, by slot:

    {"name": "Bridge",
     "workflow": "bridge.api.json",
     "slots": {"source_image": "5.image", "source_description": "8.text",
               "edit_description": ["9.text", "12.text"], "mask": "6.image", "seed": "15.noise_seed",
               "image_guidance": "14.image_guidance", "steps": "17.steps", "output": "21"},
     "values": {"steps": 20},
     "sweep": {"image_guidance": [1.0, 1.5, 2.0]}}

The workflow is in ComfyUI's API format and may use any node pack. Pictures go where the name of an uploaded
file goes: `image` of LoadImage, and for the mask of LoadImageMask with the channel red. A case without a mask
gets a white one. `output` is the node, such as SaveImage, whose picture is the edit. Slots that no case fills
are settings: they get their value from `values`, or from `sweep`, which makes a method of every value.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..server import Prompt
from .cases import TEXTS, Case, CaseError, read_json

PICTURE_SLOTS = ("source_image", "mask")
CASE_SLOTS = (*PICTURE_SLOTS, *TEXTS, "seed")
OUTPUT = "output"
_ENTRIES = {"name", "workflow", "slots", "values", "sweep"}
Input = tuple[str, str]  # node and its input


class Method(Protocol):
    """What makes an edit of a case: a workflow on a ComfyUI, or a function in this process (lab/studies).

    name: shared by the methods of one sweep.
    label: the name of its results, unique.
    swept: the setting and its value in a sweep.
    digest: equal for methods that make the same images.
    """

    @property
    def name(self) -> str: ...
    @property
    def label(self) -> str: ...
    @property
    def swept(self) -> tuple[str, float] | None: ...
    @property
    def digest(self) -> str: ...


@dataclass(frozen=True, eq=False)
class Workflow:
    """A workflow with named slots, as a Method."""

    name: str
    label: str
    prompt: Prompt
    slots: Mapping[str, Sequence[Input]]
    output: str
    swept: tuple[str, float] | None

    @property
    def digest(self) -> str:
        """Digest of everything that determines its images."""
        inputs = {slot: list(map(list, found)) for slot, found in self.slots.items() if slot in CASE_SLOTS}
        text = json.dumps([self.prompt, inputs, self.output], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def fill(self, case: Case, pictures: Mapping[str, str]) -> Prompt:
        """The prompt for a case.

        pictures: the names of the uploaded files by slot.

        Raises CaseError if the workflow needs a text that the case does not have.
        """
        prompt = copy.deepcopy(self.prompt)
        for slot in self.slots:
            if slot not in CASE_SLOTS:
                continue
            value = pictures[slot] if slot in PICTURE_SLOTS else getattr(case, slot)
            if value == "":
                raise CaseError(f"case {case.id} ({case.origin}) has no {slot}, which {self.name} needs")
            _put(prompt, self.slots[slot], value)
        return prompt


def _put(prompt: Prompt, inputs: Sequence[Input], value: Any) -> None:
    for node, name in inputs:
        prompt[node]["inputs"][name] = value


def read_methods(files: Sequence[Path]) -> list[Workflow]:
    """The methods of method files. Raises ValueError for an invalid file, workflow or slot."""
    methods = [method for file in files for method in read_method(file)]
    labels = [method.label for method in methods]
    doubled = sorted({label for label in labels if labels.count(label) > 1})
    if doubled:
        raise ValueError(f"two methods are named {doubled[0]!r}: give each its own name")
    return methods


def read_method(file: Path) -> list[Workflow]:
    """The method of a file, or one for each value of its sweep."""
    entries = read_json(file)
    if not isinstance(entries, dict) or not {"name", "workflow", "slots"} <= set(entries) <= _ENTRIES:
        raise ValueError(
            f"{file}: a method has name, workflow and slots, and may have values and sweep; "
            f"this has {', '.join(entries) if isinstance(entries, dict) else type(entries).__name__}"
        )
    prompt = read_json(file.parent / entries["workflow"])
    if not isinstance(prompt, dict) or not all(
        isinstance(node, dict) and "class_type" in node and "inputs" in node for node in prompt.values()
    ):
        raise ValueError(f"{entries['workflow']} is no workflow in API format: save it with Export (API)")
    values, sweep = entries.get("values", {}), entries.get("sweep", {})
    slots = {
        slot: [_input(file, prompt, slot, at) for at in ([found] if isinstance(found, str) else found)]
        for slot, found in entries["slots"].items()
        if slot != OUTPUT
    }
    output = str(entries["slots"].get(OUTPUT, ""))
    _check_slots(file, slots, output, values, sweep)
    if output not in prompt:
        raise ValueError(f"{file}: slot {OUTPUT}: no node {output!r}; there are {_nodes(prompt)}")
    for slot, value in values.items():
        _put(prompt, slots[slot], value)
    if not sweep:
        return [Workflow(entries["name"], entries["name"], prompt, slots, output, None)]
    ((slot, steps),) = sweep.items()
    methods = []
    for step in steps:
        changed = copy.deepcopy(prompt)
        _put(changed, slots[slot], step)
        label = f"{entries['name']} {slot}={step:g}"
        methods.append(Workflow(entries["name"], label, changed, slots, output, (slot, float(step))))
    return methods


def _input(file: Path, prompt: Prompt, slot: str, at: Any) -> Input:
    node, _, name = at.partition(".") if isinstance(at, str) else (str(at), "", "")
    if node not in prompt:
        raise ValueError(f"{file}: slot {slot}: no node {node!r}; there are {_nodes(prompt)}")
    if name not in prompt[node]["inputs"]:
        raise ValueError(
            f"{file}: slot {slot}: node {node}, {prompt[node]['class_type']}, has no input {name!r} but "
            f"{', '.join(prompt[node]['inputs'])}"
        )
    return node, name


def _nodes(prompt: Prompt) -> str:
    return ", ".join(f"{key} ({node['class_type']})" for key, node in prompt.items())


def _check_slots(
    file: Path, slots: Mapping[str, Any], output: str, values: Mapping[str, Any], sweep: Mapping[str, Any]
) -> None:
    known = ", ".join((*CASE_SLOTS, OUTPUT))
    if "source_image" not in slots or not output or not {"edit_description", "instruction"} & set(slots):
        raise ValueError(
            f"{file}: the slots source_image, output, and edit_description or instruction are needed, and "
            f"it has {', '.join(slots)}"
        )
    unknown = sorted(set(slots) - set(CASE_SLOTS) - set(values) - set(sweep))
    if unknown:
        raise ValueError(
            f"{file}: unknown slot {unknown[0]}: the slots that cases fill are {known}; any other needs a "
            "value in values or sweep"
        )
    homeless = sorted((set(values) | set(sweep)) - (set(slots) - set(CASE_SLOTS)))
    if homeless:
        raise ValueError(f"{file}: {homeless[0]} has a value but is no slot of a setting")
    steps = next(iter(sweep.values()), [0.0])
    numbers = isinstance(steps, list) and all(type(step) in (int, float) for step in steps)
    if len(sweep) > 1 or not numbers or not steps:
        raise ValueError(f"{file}: sweep is one slot with a list of numbers")

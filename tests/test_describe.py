"""The prompt that turns an instruction into an edit description, and the blueprints for beginners."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from host import ROOT, Host, Prompt
from test_workflows import input_specs, widget_values

BLUEPRINTS = sorted((ROOT / "subgraphs").glob("*.json"))
ENDS = (-10, -20)


def prompt(host: Host, **inputs: Any) -> str:
    return host.execute("DescEditDescribePrompt", **inputs)[0]


def test_prompt_asks_for_the_final_look(host: Host) -> None:
    """Protects: the instruction reaches the model, with the rule that only the final look is described."""
    text = prompt(host, instruction="make it\n  winter")
    assert "The edit: make it winter\n" in text
    assert "only the final look" in text
    for word in ("change", "replace", "add", "remove", "now", "instead", "no longer", "without"):
        assert f'"{word}"' in text
    assert "The picture is attached" in text


def test_prompt_keeps_the_source_words(host: Host) -> None:
    """Protects: with a source description its words are to be kept, and no picture is promised."""
    text = prompt(host, instruction="make it winter", source_description=" a street\nin summer ")
    assert "The picture shows now: a street in summer\nKeep the words" in text
    assert "attached" not in text


def test_prompt_takes_any_text_literally(host: Host) -> None:
    """Protects: braces and percent signs in what a user types."""
    text = prompt(host, instruction="write {words} 100%", source_description="a {sign}")
    assert "The edit: write {words} 100%\n" in text
    assert "a {sign}\n" in text


@pytest.mark.parametrize(("tokens", "words"), [(16, 10), (77, 56), (512, 382)])
def test_prompt_fits_the_context(host: Host, tokens: int, words: int) -> None:
    """Protects: the length asked for fits the text encoder: two marks, four tokens for three words."""
    text = prompt(host, instruction="make it winter", max_tokens=tokens)
    assert re.findall(r"At most (\d+) words", text) == [str(words)]


def test_empty_instruction(host: Host) -> None:
    """Protects: an empty instruction is refused by name, not sent to a language model."""
    with pytest.raises(ValueError, match=r"Instruction to Description .prompt.: instruction is empty"):
        prompt(host, instruction=" \n")


def test_there_are_blueprints() -> None:
    """Protects: the tests below from passing because they found nothing."""
    assert len(BLUEPRINTS) == 2


@pytest.mark.parametrize("file", BLUEPRINTS, ids=lambda file: file.stem)
def test_blueprint_is_served(file: Path, live_server: Any) -> None:
    """Protects: the page lists the blueprint among its nodes, and gets it whole."""
    listed = live_server.json("/global_subgraphs")
    (key,) = [key for key, entry in listed.items() if entry["name"] == file.stem]
    assert json.loads(live_server.json(f"/global_subgraphs/{key}")["data"]) == json.loads(
        file.read_text(encoding="utf-8")
    )


@pytest.mark.parametrize("file", BLUEPRINTS, ids=lambda file: file.stem)
def test_blueprint_is_sound(file: Path, object_info: dict[str, Any]) -> None:
    """Protects: inside a blueprint every node exists as the server has it, every required input is wired or
    a widget, links are the same from both ends, and the model, the mask and the seed come from outside.
    """
    shown = json.loads(file.read_text(encoding="utf-8"))
    (outer,), (graph,) = shown["nodes"], shown["definitions"]["subgraphs"]
    assert outer["type"] == graph["id"]
    names = [item["name"] for item in graph["inputs"]]
    assert {"model", "clip", "vae", "image", "mask", "source_description", "edit_description", "seed"} <= {
        *names
    }
    assert [item["name"] for item in outer["inputs"]] == names
    nodes = {node["id"]: node for node in graph["nodes"]}
    links = {link["id"]: link for link in graph["links"]}
    for node in nodes.values():
        info = object_info[node["type"]]
        specs = input_specs(info)
        wired = {item["name"] for item in node["inputs"] if item["link"] is not None}
        assert {item["name"] for item in node["inputs"]} <= set(specs)
        needed = {name for name in info["input"].get("required", {}) if not specs[name][0]}
        assert needed <= wired, f"{node['type']} lacks {needed - wired}"
        assert [item["type"] for item in node["outputs"]] == info["output"]
    for link in links.values():
        if link["origin_id"] == ENDS[0]:
            assert link["id"] in graph["inputs"][link["origin_slot"]]["linkIds"]
        else:
            assert link["id"] in nodes[link["origin_id"]]["outputs"][link["origin_slot"]]["links"]
        if link["target_id"] == ENDS[1]:
            assert link["id"] in graph["outputs"][link["target_slot"]]["linkIds"]
        else:
            assert nodes[link["target_id"]]["inputs"][link["target_slot"]]["link"] == link["id"]
    ends = [number for item in (*graph["inputs"], *graph["outputs"]) for number in item["linkIds"]]
    inner = [item["link"] for node in nodes.values() for item in node["inputs"] if item["link"] is not None]
    assert {*ends, *inner} == set(links)
    for node_id, name in outer["properties"]["proxyWidgets"]:
        assert name in input_specs(object_info[nodes[int(node_id)]["type"]])


def as_prompt(graph: dict[str, Any], given: dict[str, Any], object_info: dict[str, Any]) -> Prompt:
    """The inside of a blueprint as the page would queue it, with `given` on the blueprint's own inputs."""
    links = {link["id"]: link for link in graph["links"]}
    prompt: Prompt = {}
    for node in graph["nodes"]:
        inputs = widget_values(node, input_specs(object_info[node["type"]]))
        for item in node["inputs"]:
            link = links.get(item["link"])
            if link is None:
                continue
            if link["origin_id"] != ENDS[0]:
                inputs[item["name"]] = [str(link["origin_id"]), link["origin_slot"]]
            elif (name := graph["inputs"][link["origin_slot"]]["name"]) in given:
                inputs[item["name"]] = given[name]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


@pytest.mark.parametrize("file", BLUEPRINTS, ids=lambda file: file.stem)
def test_blueprint_runs_with_the_tiny_studio(host: Host, object_info: dict[str, Any], file: Path) -> None:
    """Protects: with nothing but the Tiny Studio and a scene wired to it, a blueprint edits inside the mask
    and keeps every pixel outside.
    """
    (graph,) = json.loads(file.read_text(encoding="utf-8"))["definitions"]["subgraphs"]
    scene = [["scene", slot] for slot in range(5)]
    given: dict[str, Any] = {
        name: ["studio", slot] for slot, name in enumerate(("model", "clip", "vae", "bridge"))
    }
    given |= {"image": scene[0], "mask": scene[2], "source_description": scene[3]}
    given |= {"edit_description": scene[4], "side": 128, "steps": 2}
    prompt = as_prompt(graph, given, object_info)
    prompt["studio"] = {"class_type": "DescEditTinyStudio", "inputs": {}}
    scene_inputs = {"edit_type": "colour", "seed": 8, "wording": "complex"}
    prompt["scene"] = {"class_type": "DescEditTinyScene", "inputs": scene_inputs}
    (result,) = [key for key, node in prompt.items() if node["class_type"] == "DescEditStitch"]
    prompt["shown"] = {"class_type": "PreviewImage", "inputs": {"images": [result, 0]}}
    outputs = host.run_graph(prompt)
    (edited, *_), (source, _, mask, *_) = outputs[result], outputs["scene"]
    outside = mask[0] == 0
    assert torch.equal(edited[0][outside], source[0][outside])
    assert float((edited - source).abs().max()) > 0.1


def test_typed_texts_come_first(host: Host) -> None:
    """Protects: a connected text is used only while its box is empty, each box for itself."""
    clip = host.execute("DescEditTinyStudio")[1]
    wired = {"source_text": "a red circle", "edit_text": "a blue circle"}
    typed = {"source_description": "a red circle", "edit_description": "a green circle"}

    def tokens(**texts: str) -> Any:
        given = {"source_description": "", "edit_description": " ", **texts}
        return host.execute("DescEditDescribe", clip=clip, **given)

    found = tokens(**wired)
    assert found[2] == tokens(source_description="a red circle", edit_description="a blue circle")[2]
    assert torch.equal(found[0][0][0], tokens(**typed)[0][0][0])
    assert tokens(**wired, **typed)[2] == tokens(**typed)[2] != found[2]
    assert [word.text for word in tokens(**wired, edit_description="a star")[2].words] == ["star"]
    with pytest.raises(ValueError, match="Describe Edit: source_description is empty: describe the image"):
        tokens(edit_text="a blue circle")


def test_unknown_words_are_named(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    """Protects: words that the Tiny Studio does not know are named, once each, by Describe Edit's text and in
    the log, also if a stock node encodes them; numbers and punctuation are no words.
    """
    _, clip, *_ = host.execute("DescEditTinyStudio")
    texts = {"source_description": "a red circle", "edit_description": "a (turquoise:1.3) elephant, red"}
    assert host.execute("DescEditDescribe", clip=clip, **texts)[3].endswith(
        "\nnot known to the Tiny Studio: turquoise, elephant"
    )
    host.execute("CLIPTextEncode", clip=clip, text="a purple zebra and an elephant")
    warned = [record.getMessage() for record in caplog.records if "Tiny Studio" in record.getMessage()]
    assert [message.partition(" not known")[0].removeprefix("Tiny Studio: ") for message in warned] == [
        "turquoise, elephant",
        "zebra",
    ]
    known = {"source_description": "a red circle", "edit_description": "a large blue circle"}
    assert "not known" not in host.execute("DescEditDescribe", clip=clip, **known)[3]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_help_lists_the_vocabulary(host: Host, language: str) -> None:
    """Protects: the help of Load Tiny Studio lists exactly the words of the shipped embedding table."""
    _, clip, *_ = host.execute("DescEditTinyStudio")
    page = (ROOT / "web/docs/DescEditTinyStudio" / f"{language}.md").read_text(encoding="utf-8")
    lists = [line.partition(": ")[2] for line in page.splitlines() if re.match(r"- [^*]+: [a-z]", line)]
    listed = {word for line in lists for word in re.findall("[a-z]+", line)}
    assert host.pack_module("models.tiny_studio.studio").unknown_words(clip, " ".join(listed)) == []
    tokens = {token for word in listed for token in host.pack_module("models.tiny_studio.words").tokens(word)}
    assert tokens == set(clip.tokenizer.known)

"""`dev.py calibrate` on the Tiny Studio as a user's checkpoint, and the model as a judge of edits."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from host import Host
from PIL import Image


@pytest.fixture(scope="module")
def lab(host: Host) -> Any:
    """The modules."""
    names = ("calibrate", "model_judge", "benchmark.layouts", "benchmark.cases", "studies.studio")
    found = {name.rpartition(".")[2]: host.pack_module(f"lab.{name}") for name in names}
    found["studio_file"] = host.pack_module("models.tiny_studio.studio").FILE
    found["shows"] = host.pack_module("lab.tiny_studio.attribute_classifier").shows
    return SimpleNamespace(**found)


@pytest.fixture(scope="module")
def cases(lab: Any) -> list[Any]:
    """The first tuning case of each type."""
    return lab.cases.first_of_each_type(lab.layouts.read_cases("tiny-studio", None, "tuning"), 1)


@pytest.fixture(scope="module")
def pairs(cases: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An object and a style as a user's folder, the style without a mask."""
    folder = tmp_path_factory.mktemp("pairs")
    lines = []
    for case in (cases[2], cases[4]):
        line = {"id": case.id, "type": case.edit_type, "source_image": f"{case.id}.png"}
        case.source().save(folder / line["source_image"])
        if (mask := case.read("mask")) is not None:
            line["mask"] = f"{case.id}-mask.png"
            mask.save(folder / line["mask"])
        texts = {"source_description": case.source_description, "edit_description": case.edit_description}
        lines.append(json.dumps({**line, **texts}))
    (folder / "cases.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def test_model_as_judge(lab: Any, cases: list[Any]) -> None:
    """Protects: the model tells the true edit from the source by their descriptions, and its structure
    distance is the mean squared difference of the attention: 0 for the same picture, less for a darker one.
    """
    checkpoint, _ = lab.calibrate.Checkpoint.load(lab.studio_file)
    tiny = lab.studio.Studio(checkpoint.model, checkpoint.clip, checkpoint.vae)
    judge = lab.model_judge
    with torch.inference_mode():
        for case in (cases[0], cases[2]):
            batch = lab.studio.Batch.of(tiny, [case])
            source, edit = map(lab.studio.conditioning, (batch.source_text, batch.edit_text))
            true, small = tiny.vae.encode(batch.target), tiny.vae.encode(0.98 * batch.source)
            assert judge.text_fit(tiny.model, batch.latent, source, edit) < 0
            assert judge.text_fit(tiny.model, true, source, edit) > 0
            before, after, near = (
                judge.structure_maps(tiny.model, latent, edit) for latent in (batch.latent, true, small)
            )
            assert judge.structure_change(before, before) == 0
            assert 0 < judge.structure_change(before, near) < judge.structure_change(before, after)
            layer = next(iter(before))
            whole = [maps[layer].probabilities() for maps in (before, after)]
            expected = 1000 * float((whole[0] - whole[1]).square().mean())
            one = judge.structure_change({layer: before[layer]}, after)
            assert one == pytest.approx(expected, rel=1e-4)


def test_dino_judges_outside_the_mask(lab: Any, cases: list[Any], pairs: Path, tmp_path: Path) -> None:
    """Protects: where DINO is there it judges the structure, and a true edit, which changes nothing outside
    its mask, changes no structure.
    """
    calibrate = lab.calibrate
    checkpoint, _ = calibrate.Checkpoint.load(lab.studio_file)
    scorer = calibrate.Scorer()
    scorer.networks = {"structure_distance": lambda one, two: (one - two).abs().mean((1, 2, 3))}
    found = calibrate.read_cases("folder", pairs, "")
    calibration = calibrate.Calibration(checkpoint, found, scorer, calibrate.Results(tmp_path), 512)
    assert calibration.structure == "dino_structure"
    one, true = calibration.cases[0], cases[2].read("target_image")
    assert calibration._judge(one, true)["dino_structure"] == 0
    assert calibration._judge(calibrate.replace(one, mask=None), true)["dino_structure"] > 0


def test_pictures_fit(lab: Any, tmp_path: Path) -> None:
    """Protects: a large picture, its mask and its true edit come to the model in one size of whole cells."""
    names = ("source_image", "mask", "target_image")
    for name, size in zip(names, ((300, 201), (300, 201), (150, 100)), strict=True):
        Image.new("L" if name == "mask" else "RGB", size).save(tmp_path / f"{name}.png")
    texts = {"source_description": "a", "edit_description": "b"}
    line = {"id": "1", "type": "t", **texts, **{name: f"{name}.png" for name in names}}
    (tmp_path / "cases.jsonl").write_text(json.dumps(line), encoding="utf-8")
    (case,) = lab.calibrate.read_cases("folder", tmp_path, "")
    for side, size in ((128, (128, 80)), (1000, (296, 200))):
        fitted = lab.calibrate.fitted(case, side)
        assert [fitted.read(name).size for name in names] == [size] * 3


def test_search_finds_the_shipped_settings(
    lab: Any, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects: from settings that leave the picture as it is, the search on a user's pictures finds ones
    that make the edits and score at least as well as the shipped ones; a second run makes no edit again.
    """
    calibrate, out = lab.calibrate, tmp_path / "out"
    shipped = calibrate.TINY
    monkeypatch.setattr(calibrate, "TINY", calibrate.replace(shipped, denoise=0.1))
    monkeypatch.setattr(calibrate, "GRID", {"denoise": (shipped.denoise,), "cfg": (shipped.cfg, 8.0)})
    arguments = ["--checkpoint", str(lab.studio_file), "--pairs", str(pairs), "--out", str(out)]
    arguments += ["--steps", "5", "--json", str(tmp_path / "found.json")]
    assert calibrate.main(arguments) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    lines = (out / "settings.md").read_text().splitlines()
    names, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    scores = {(float(row[0]), float(row[1])): float(row[5]) for row in rows[1:]}
    tried, start = (shipped.denoise, shipped.cfg), (0.1, shipped.cfg)
    assert names[5] == "score"
    assert found["score"] == pytest.approx(max(scores.values()), rel=0.01)
    assert found["score"] >= 0.99 * scores[tried] > scores[start]
    best = calibrate.Setting(**json.loads((out / "settings.json").read_text()))
    assert calibrate.asdict(best).items() <= found.items()
    results = calibrate.Results(out).all
    made = [r["metrics"]["own_text"] for r in results if r["method"] == best.label]
    left = [r["metrics"]["own_text"] for r in results if "denoise 0.1" in r["method"]]
    assert len(made) == 2
    assert min(made) > max(min(left), 0)
    assert {"sheet.jpg", "report.html", "tables"} <= {file.name for file in out.iterdir()}
    monkeypatch.setattr(calibrate.Calibration, "edited", lambda *_: pytest.fail("made again"))
    assert calibrate.main(arguments) == 0
    assert json.loads((tmp_path / "found.json").read_text()) == found


def test_refusals(lab: Any, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Protects: a missing checkpoint, a file that is none, a folder without cases and a case that cannot be
    edited are refused by name.
    """
    files = ("none", "other", "broken")
    none, other, broken = (tmp_path / f"{name}.safetensors" for name in files)
    safetensors.torch.save_file({"a": torch.zeros(1)}, other)
    broken.write_bytes(b"not a file of weights")
    same = tmp_path / "same"
    same.mkdir()
    Image.new("RGB", (64, 64)).save(same / "a.png")
    texts = {"source_description": "a red circle", "edit_description": "a red circle"}
    line = {"id": "one", "type": "t", "source_image": "a.png", **texts}
    (same / "cases.jsonl").write_text(json.dumps(line), encoding="utf-8")
    for checkpoint, folder, said in (
        (none, pairs, "there is no file"),
        (other, pairs, "is no checkpoint"),
        (broken, pairs, "is no checkpoint"),
        (lab.studio_file, same, "case one"),
        (lab.studio_file, tmp_path, "is not a benchmark folder"),
    ):
        arguments = ["--checkpoint", str(checkpoint), "--pairs", str(folder), "--out", str(tmp_path / "out")]
        assert lab.calibrate.main(arguments) == 2
        assert said in capsys.readouterr().err

"""The training command's configuration: what is read, what is refused, and what is printed."""

from __future__ import annotations

import sys
from dataclasses import asdict, is_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from host import ROOT, Host
from training_settings import settings, write


@pytest.fixture(scope="module")
def training(host: Host) -> Any:
    """The pack's training modules."""
    names = ("config", "command", "objective")
    return SimpleNamespace(**{name: host.pack_module(f"training.{name}") for name in names})


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Where no data is: a configuration does not ask."""
    return tmp_path / "data"


def descriptions(kind: Any) -> dict[str, str]:
    """The description of every setting of a tree of dataclasses, by its dotted name."""
    found = {}
    for name, entry in kind.__pydantic_fields__.items():
        found[name] = entry.description
        if is_dataclass(entry.annotation):
            found |= {f"{name}.{inner}": text for inner, text in descriptions(entry.annotation).items()}
    return found


def test_every_setting_is_documented(training: Any, tmp_path: Path, data: Path) -> None:
    """Protects: the printed configuration has a text for every setting, and read back it is the defaults."""
    config, text = training.config, training.config.documented()
    printed = " ".join(text.replace("# ", "").split())
    for name, words in descriptions(config.Config).items():
        assert words, name
        assert f" {words}" in f" {printed}", name
    tree = yaml.safe_load(text)
    assert tree["base"] is None
    tree["base"] = "tiny_studio"
    tree["data"]["path"] = str(data)
    expected = config.Config(base="tiny_studio", data=config.DataConfig(path=str(data)))
    assert config.read_config(write(tmp_path / "all.yaml", tree)) == expected


def test_shipped_configurations(training: Any) -> None:
    """Protects: every configuration that ships can be read."""
    found = sorted((ROOT / "training" / "configs").glob("*.yaml"))
    assert len(found) >= 2
    for path in found:
        assert training.config.read_config(path).steps > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__learning_rat": 1.0}, r"no setting train\.learning_rat; the nearest is train\.learning_r"),
        ({"train__objective__dropuot": "none"}, r"the nearest is train\.objective\.dropout"),
        ({"qqq": 1}, r"no setting qqq; there are base, data"),
        ({"train__batch": "four"}, r"train\.batch is 'four' \(str\) but must be a valid integer"),
        ({"train__batch": True}, r"train\.batch is True \(bool\) but must be a valid integer"),
        ({"train__clip": None}, r"train\.clip is empty but must be a valid number"),
        ({"logging__tensorboard": 1}, r"logging\.tensorboard is 1 \(int\) but must be a valid boolean"),
        ({"train__objective__dropped_image": False}, r"must be 'off' or 'white': put it in quotes"),
        ({"base": True}, r"base is True \(bool\) but must be a valid string: put it in quotes"),
        ({"bridge": [1]}, r"bridge is \[1\] \(list\) but must be an object"),
        ({"bridge__rnk": 1}, r"no setting bridge\.rnk; the nearest is bridge\.rank"),
        ({"bridge__rank": "1"}, r"bridge\.rank is '1' \(str\) but must be a valid integer"),
        ({"data__path": 3}, r"data\.path is 3 \(int\) but must be a valid string"),
        (
            {"data__columns": {"text": "a"}},
            r"data\.columns\.text is 'text' \(str\) but must be 'source_image'",
        ),
        ({"train__precision": "fp64"}, r"train\.precision is 'fp64' \(str\) but must be 'fp32', 'bf16' or"),
        ({"train__seed": 2**64}, r"train\.seed is \d+ \(int\) but must be less than or equal to 1844\d+"),
        ({"bridge__fusion": "sum"}, r"bridge\.fusion is 'sum' but must be one of"),
        ({"checkpoint__keep": 0}, r"checkpoint\.keep is 0 \(int\) but must be greater than or equal to 1"),
        ({"device": "tpu"}, r"device is 'tpu' \(str\) but must be 'auto' or 'cuda'"),
    ],
)
def test_wrong_configuration(
    training: Any, tmp_path: Path, data: Path, changes: dict[str, Any], message: str
) -> None:
    """Protects: a setting that is unknown, of a wrong type or impossible is refused by its dotted path."""
    file = write(tmp_path / "wrong.yaml", settings(data, tmp_path, **changes))
    with pytest.raises(ValueError, match=message):
        training.config.read_config(file)


def test_missing_settings_and_broken_yaml(training: Any, tmp_path: Path) -> None:
    """Protects: what must be given is asked for, and a file that is not YAML is named."""
    for text, message in (
        ("base: tiny_studio\n", r"data is missing"),
        ("base: tiny_studio\ndata: {kind: folder}\n", r"data\.path is missing"),
        ("base: [\n", r"broken\.yaml cannot be read as YAML"),
        ("", r"the file is empty but must be an object"),
    ):
        (tmp_path / "broken.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            training.config.read_config(tmp_path / "broken.yaml")
    with pytest.raises(ValueError, match=r"none\.yaml cannot be read"):
        training.config.read_config(tmp_path / "none.yaml")


def test_numbers_as_people_write_them(training: Any, tmp_path: Path, data: Path) -> None:
    """Protects: 1e-5, which YAML takes for text, is a number; so is a whole one where a fraction may be."""
    tree = settings(data, tmp_path, train__clip=2)
    text = yaml.safe_dump(tree).replace("learning_rate: 0.001", "learning_rate: 1e-5")
    (tmp_path / "numbers.yaml").write_text(text)
    train = training.config.read_config(tmp_path / "numbers.yaml").train
    assert (train.learning_rate, train.clip, type(train.clip)) == (1e-5, 2.0, float)


def test_prints_its_settings(training: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: --print-config prints the documented defaults."""
    monkeypatch.setattr(sys, "argv", ["training", "--print-config"])
    training.command.main()
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["train"]["objective"] == asdict(training.objective.Objective())
    assert printed["bridge"]["rank"] == 64

"""The pages for people who work on the pack: what they name exists, and a release is checked."""

from __future__ import annotations

import re
import runpy
import subprocess
from typing import Any

import pytest
from host import ROOT
from test_dev import dev as dev

PAGES = [ROOT / name for name in ("CONTRIBUTING.md", "AGENTS.md", "RELEASING.md", "docs/architecture.md")]
PROJECT = '[project]\nversion = "1.2.3"\n'
CHANGES = "# Changelog\n\n## [Unreleased]\n\n## [1.2.3] - 2026-01-31\n\n### Added\n- A node.\n"


def test_named_commands_exist(dev: Any) -> None:
    """Protects: every `python dev.py NAME` on a page, in an issue form or in the checks is a command."""
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("web/docs/*/*.md")]
    files += [file for file in (ROOT / ".github").rglob("*") if file.is_file()]
    named = {
        name for file in files for name in re.findall(r"python dev\.py ([a-z-]+)", file.read_text("utf-8"))
    }
    assert len(named) > 5
    assert named - {*dev.MODULES, *dev.COMMANDS} == set()


def test_named_paths_exist() -> None:
    """Protects: a file or folder that a page for contributors names is there."""
    rooms = "nodes|patches|models|metrics|pictures|training|lab|tests|docs|web|locales|workflows"
    path = re.compile(rf"[`(]((?:{rooms})/[\w./-]*)[`)]")
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        named = {*path.findall(text), *re.findall(r"\]\(([\w./-]+)\)", text)}
        there = {name for name in named if (ROOT / name).exists() or (page.parent / name).exists()}
        assert named - there == set(), page.name


def test_install_commands_work_from_a_checkout() -> None:
    """Protects: no message or page sends anybody to an extra of a package that is not on PyPI."""
    command = ["git", "ls-files", "*.py", "*.md"]
    files = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in files if (ROOT / name).is_file()}
    named = {found for text in texts.values() for found in re.findall(r"install -r ([\w/.-]+\.txt)", text)}
    assert {"lab/requirements.txt", "training/requirements.txt"} <= named
    assert [name for name in named if not (ROOT / name).is_file()] == []
    extra = re.compile(r"descriptive-edit" + r"\[|the extra `?\[|\[project\.optional")
    assert [name for name, text in texts.items() if extra.search(text)] == []


def test_the_checks_on_github_run_it_all() -> None:
    """Protects: what is released was checked and tested, and its tag, version and changelog agree."""
    checks = (ROOT / ".github" / "workflows" / "checks.yml").read_text(encoding="utf-8")
    before, _, publish = checks.partition("\n  publish:\n")
    for command in ("python dev.py check", "python dev.py test --page"):
        assert f"- run: {command}\n" in before
    jobs = re.findall(r"^  ([\w-]+):\n    (?:name|runs-on)", before, re.MULTILINE)
    assert f"needs: [{', '.join(jobs)}]" in publish
    steps = publish.partition("steps:")[2]
    assert 'python lab/release.py "$GITHUB_REF_NAME"' in steps.partition("publish-node-action")[0]


@pytest.mark.parametrize(
    ("project", "changelog", "tag", "message"),
    [
        (PROJECT, CHANGES, "v1.2.3", ""),
        (PROJECT, CHANGES, None, ""),
        (PROJECT, CHANGES, "v1.2.4", "the tag is v1.2.4 but pyproject.toml has version 1.2.3"),
        (PROJECT, CHANGES, "1.2.3", "the tag is 1.2.3 but"),
        (PROJECT.replace("1.2.3", "1.2"), CHANGES, None, "has no version of the form"),
        (PROJECT, CHANGES.replace(" - 2026-01-31", ""), None, r"section \[1.2.3\] has no date"),
        (PROJECT, CHANGES.replace("[1.2.3]", "[1.2.2]"), None, r"newest section is \[1.2.2\], but"),
        (PROJECT, CHANGES.partition("## [1.2.3]")[0], None, "newest section is none, but"),
        (PROJECT, CHANGES.replace("### Added\n- A node.\n", ""), None, r"section \[1.2.3\] is empty"),
        (PROJECT, CHANGES.replace("[Unreleased]\n", "[Unreleased]\n\n- More.\n"), None, "under .Unreleased"),
    ],
)
def test_release(project: str, changelog: str, tag: str | None, message: str) -> None:
    """Protects: a release whose tag, version and dated changelog section disagree is stopped."""
    problems = runpy.run_path(str(ROOT / "lab" / "release.py"))["problems"]
    found = problems(project, changelog, tag)
    assert len(found) == bool(message)
    assert re.search(message, "\n".join(found))

"""`python lab/release.py [TAG]`: whether tag, version and changelog agree. Standard library only."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def problems(project: str, changelog: str, tag: str | None) -> list[str]:
    """What stops a release: texts of pyproject.toml and CHANGELOG.md, and the tag if there is one already."""
    found = []
    match = re.search(r'^version = "(\d+\.\d+\.\d+)"$', project, re.MULTILINE)
    if match is None:
        return ["pyproject.toml has no version of the form 1.2.3"]
    version = match[1]
    if tag is not None and tag != f"v{version}":
        found.append(f"the tag is {tag} but pyproject.toml has version {version}: they must be v{version}")
    sections = re.findall(r"^## \[([^\]]+)\](.*)\n((?:(?!## ).*\n?)*)", changelog, re.MULTILINE)
    released = [(name, rest, text) for name, rest, text in sections if name != "Unreleased"]
    if any(name == "Unreleased" and text.strip() for name, _, text in sections):
        found.append(f"CHANGELOG.md has entries under [Unreleased]: put them under [{version}]")
    if not released or released[0][0] != version:
        newest = f"[{released[0][0]}]" if released else "none"
        found.append(f"CHANGELOG.md's newest section is {newest}, but the version is {version}")
    elif not re.fullmatch(r" - \d{4}-\d{2}-\d{2}", released[0][1]):
        found.append(f"CHANGELOG.md's section [{version}] has no date: write ## [{version}] - YYYY-MM-DD")
    elif not released[0][2].strip():
        found.append(f"CHANGELOG.md's section [{version}] is empty")
    return found


def main(arguments: list[str]) -> int:
    project, changelog = ((ROOT / name).read_text("utf-8") for name in ("pyproject.toml", "CHANGELOG.md"))
    found = problems(project, changelog, arguments[0] if arguments else None)
    print("\n".join(found) or "tag, version and changelog agree")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""`python dev.py run lab.templates.command`: write the templates and blueprints; `--pictures` also draws the
templates' pictures anew, `--help-pictures` those of the help pages.

Pictures come from a real server, at each template's own settings. What cannot run here is drawn with the Tiny
Studio in the checkpoint's place, and says so.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..server import Server, device_arguments
from .contents import BLUEPRINTS, TEMPLATES
from .foreign import FOREIGN
from .graph import Blueprint, Graph, Info
from .pictures import draw, draw_help

ROOT = Path(__file__).resolve().parents[2]


def graphs(info: Info) -> dict[str, Graph]:
    """Every template by name."""
    found = {}
    for name, build in TEMPLATES.items():
        found[name] = Graph(name, {**FOREIGN, **info})
        build(found[name])
    return found


def files(info: Info) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every generated file, by its path below the root, with its content.

    info: what the server says of every node.
    """
    for name, graph in graphs(info).items():
        yield Path("workflows", f"{name}.json"), graph.workflow()
        yield Path("workflows", "api", f"{name}.json"), graph.prompt
    for name, (build, description) in BLUEPRINTS.items():
        blueprint = Blueprint(name, info, description=description)
        build(blueprint)
        yield Path("subgraphs", f"{name}.json"), blueprint.workflow()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="lab.templates.command", description=__doc__)
    parser.add_argument(
        "--pictures", nargs="*", metavar="NAME", help="draw these templates, or all; such as 03"
    )
    parser.add_argument(
        "--help-pictures", action="store_true", help="draw what nodes show for their help pages"
    )
    options = parser.parse_args(arguments)
    with Server(Path(os.environ["COMFYUI_PATH"]), device_arguments()) as server:
        info = server.object_info()
        for path, content in files(info):
            text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
            (ROOT / path).write_text(text, encoding="utf-8", newline="\n")
        prompts = {name: graph.prompt for name, graph in graphs(info).items()}
        if options.help_pictures:
            draw_help(server, prompts, ROOT / "web" / "docs" / "pictures")
        if options.pictures is not None:
            for name in prompts:
                if not options.pictures or name[:2] in options.pictures:
                    print(f"drawing {name}", flush=True)
                    draw(server, name, prompts, ROOT / "workflows" / f"{name}.jpg")
    return 0


if __name__ == "__main__":
    sys.exit(main())

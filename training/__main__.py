"""`python -m training` and `accelerate launch -m training`, from the pack's folder: see `command`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from .inside import ROOT, run_inside


def comfyui() -> Path:
    """The ComfyUI to use: COMFYUI_PATH, else the one whose custom_nodes folder the pack is in, else
    dev.py's.
    """
    named = os.environ.get("COMFYUI_PATH")
    places = [Path(named)] if named else [ROOT.parent.parent, ROOT / ".comfyui" / "ComfyUI"]
    for place in places:
        if (place / "main.py").is_file() and (place / "comfyui_version.py").is_file():
            return place.resolve()
    sys.exit(f"training: no ComfyUI in {' or '.join(map(str, places))}: set the variable COMFYUI_PATH")


if __name__ == "__main__":
    os.environ["COMFYUI_PATH"] = str(comfyui())
    run_inside("training.command", sys.argv[1:])

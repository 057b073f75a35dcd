"""`python -m training` and `accelerate launch -m training`, from the pack's own folder: see `run`.

Run like this the package is no part of the pack's, so it is run again inside of it, by `dev.run_inside`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import dev


def comfyui() -> Path:
    """The variable COMFYUI_PATH, the ComfyUI whose custom_nodes folder the pack is in, or dev.py's."""
    named = os.environ.get("COMFYUI_PATH")
    places = [Path(named)] if named else [dev.ROOT.parent.parent, dev.STATE / "ComfyUI"]
    for place in places:
        if dev.comfyui_version(place) is not None:
            return place.resolve()
    sys.exit(f"training: no ComfyUI in {', '.join(map(str, places))}: set the variable COMFYUI_PATH")


if __name__ == "__main__":
    os.environ["COMFYUI_PATH"] = str(comfyui())
    dev.run_inside("training.run", sys.argv[1:])

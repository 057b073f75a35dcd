"""Libraries that only training needs; training/requirements.txt lists them."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

REQUIREMENTS = Path(__file__).with_name("requirements.txt")


def library(name: str) -> ModuleType:
    """The module `name`. Raises ImportError with the command that installs what is missing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ImportError(
            f"training needs the library {name.partition('.')[0]}: install it with "
            f'"{sys.executable}" -m pip install -r "{REQUIREMENTS}"'
        ) from None

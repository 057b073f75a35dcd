"""Fixtures every test shares: `host`, ComfyUI in this process, and `live_server`, ComfyUI as a server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import host as _host
import pytest

_host.prepare()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--page", action="store_true", help="run tests/page too: ComfyUI's page in Chromium")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if collection_path.name == "page" and not config.getoption("--page") else None


@pytest.fixture(scope="session")
def host() -> _host.Host:
    """ComfyUI in this process, on the CPU, with the pack loaded by its own loader."""
    return _host.Host()


@pytest.fixture(scope="session")
def live_server() -> Iterator[Any]:
    """A real server with the pack in it, shared by the tests that need one."""
    with _host.live_server() as running:
        yield running

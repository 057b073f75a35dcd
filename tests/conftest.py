"""Fixtures every test shares: `host`, ComfyUI in this process; `live_server`, ComfyUI as a server; and
`memory_mode`, how the host keeps weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import host as _host
import pytest

_host.prepare()

from memory_modes import MODES  # noqa: E402 - it imports the host


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--page", action="store_true", help="run tests/page too: ComfyUI's page in Chromium")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if collection_path.name == "page" and not config.getoption("--page") else None


@pytest.fixture(scope="session")
def host() -> _host.Host:
    """ComfyUI in this process, on the CPU, with the pack loaded by its own loader."""
    return _host.Host()


@pytest.fixture(scope="module", params=MODES)
def memory_mode(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs what asks for it once in every memory mode: its models must be loaded in it too, so a fixture that
    loads one asks for it as well. A test that needs certain modes only says so with
    `@pytest.mark.parametrize("memory_mode", ["lazy"], indirect=True)`.
    """
    with MODES[request.param]():
        yield request.param


@pytest.fixture(scope="session")
def live_server() -> Iterator[Any]:
    """A real server with the pack in it, shared by the tests that need one."""
    with _host.live_server() as running:
        yield running

"""Fixtures every test shares: `host`, ComfyUI in this process; `live_server`, ComfyUI as a server, and its
`object_info`; and `memory_mode`, how the host keeps weights.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import host as _host
import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--page", action="store_true", help="run tests/page too: ComfyUI's page in Chromium")
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where models run")


def pytest_configure(config: pytest.Config) -> None:
    try:
        _host.prepare(config.getoption("--device"))
    except RuntimeError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if collection_path.name == "page" and not config.getoption("--page") else None


@pytest.fixture(scope="session")
def host() -> _host.Host:
    """ComfyUI in this process with the pack loaded by its own loader."""
    return _host.Host()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "memory_mode" not in metafunc.fixturenames:
        return
    own = metafunc.definition.iter_markers("parametrize")
    if not any("memory_mode" in mark.args[0] for mark in own):
        metafunc.parametrize("memory_mode", importlib.import_module("memory_modes").MODES, indirect=True)


@pytest.fixture(scope="module")
def memory_mode(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs what asks for it once in every memory mode: its models must be loaded in it too, so a fixture that
    loads one asks for it as well. A test that needs certain modes only says so with `memory_modes.only`.
    """
    with importlib.import_module("memory_modes").CONTEXTS[request.param]():
        yield request.param


@pytest.fixture(scope="session")
def live_server() -> Iterator[Any]:
    """A real server with the pack in it, shared by the tests that need one."""
    with _host.live_server() as running:
        yield running


@pytest.fixture(scope="session")
def object_info(live_server: Any) -> dict[str, Any]:
    """Every node as that server describes it to the page."""
    return live_server.object_info()

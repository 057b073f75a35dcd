"""The titles of nodes on errors: whose get one, and which."""

from __future__ import annotations

from typing import Any

import pytest
from host import Host


@pytest.fixture
def door(host: Host) -> Any:
    """What a node leaves in a SAMPLER, by the node's id."""
    naming = host.pack_module("nodes.errors").naming
    return lambda node_id: naming(host.node(node_id))


def _fail_in_the_pack(host: Host) -> None:
    host.pack_module("patches.unify.balance").Balance(beta1=-1.0)


def test_own_errors_get_the_innermost_title(host: Host, door: Any) -> None:
    """Protects: an error of this pack begins with the title of the node that raised it, once."""
    message = r"^UnifyEdit Sampler: beta1 is -1\.0"
    with pytest.raises(ValueError, match=message), door("DescEditApplyBridge"), door("DescEditUnifySampler"):
        _fail_in_the_pack(host)


def test_other_errors_pass_unchanged(door: Any) -> None:
    """Protects: errors of other packs, of other kinds and of generated code stay as they are."""
    for error in (ValueError("another pack's"), TypeError("of another kind")):
        with pytest.raises(type(error)) as caught, door("DescEditUnifySampler"):
            raise error
        assert caught.value is error
    code = compile("raise ValueError('generated')", "generated", "exec")
    with pytest.raises(ValueError, match=r"^generated$"), door("DescEditUnifySampler"):
        exec(code, {})

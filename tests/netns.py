"""Tests of networks run in a namespace of their own: addresses there may be any, and nothing ever leaves.

@in_namespace
def test_a_bridge_is_made() -> None: ...
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from typing import ParamSpec

import pytest

from kvik.errors import HostError
from kvik.host.bridge import bridge_ports
from kvik.host.namespace import Namespace
from kvik.host.netlink import Netlink

P = ParamSpec("P")


def new_namespace() -> Namespace:
    if os.geteuid() != 0:
        pytest.skip("needs root: makes a network namespace")
    try:
        return Namespace()
    except HostError as error:
        pytest.skip(f"no network namespaces here: {error}")


def in_namespace(test: Callable[P, None]) -> Callable[P, None]:
    """Run the test's body on a thread of its own, in a new network namespace that ends with it."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        with new_namespace() as namespace:
            namespace.run(lambda: test(*args, **kwargs))

    return pytest.mark.root(run)


def until(check: Callable[[], bool]) -> None:
    """Wait for what the kernel does a moment later."""
    for _ in range(1000):
        if check():
            return
        time.sleep(0.01)
    raise AssertionError("not within ten seconds")


def until_ports_forward(netlink: Netlink) -> None:
    """A port opens when the kernel's link watch has seen its carrier, which may be a moment after it is set up."""
    until(lambda: all(port.state == "forwarding" for port in bridge_ports(netlink)))

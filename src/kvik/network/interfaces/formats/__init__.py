"""The configuration that a host keeps its interfaces in: one module a format, all with the same functions.

names(tree)                  the interfaces that it defines by name
describe(tree, name)         the document of one, None if it does not define it
define(tree, document)       -> Changes: replaced or added
undefine(tree, name)         -> Changes
bridge(tree, port, document) -> Changes: what `port` has goes to the bridge of `document`, whatever it is
unbridge(tree, name, port)   -> Changes: the way back
"""

from __future__ import annotations

from typing import Protocol

from kvik.conf.interface import Interface
from kvik.network.interfaces.formats import ifupdown, netplan, networkd, networkmanager
from kvik.network.interfaces.formats.tree import Changes, Tree


class Format(Protocol):
    """What each module is. `RELOAD`: the command that tells what runs that files have changed."""

    @property
    def NAME(self) -> str: ...
    @property
    def RELOAD(self) -> tuple[str, ...]: ...

    def names(self, tree: Tree) -> list[str]: ...
    def describe(self, tree: Tree, name: str) -> Interface | None: ...
    def define(self, tree: Tree, document: Interface) -> Changes: ...
    def undefine(self, tree: Tree, name: str) -> Changes: ...
    def bridge(self, tree: Tree, port: str, document: Interface) -> Changes: ...
    def unbridge(self, tree: Tree, name: str, port: str) -> Changes: ...


# netplan first: where it is, it writes the files of the others.
FORMATS: tuple[Format, ...] = (netplan, networkmanager, networkd, ifupdown)


def owner(tree: Tree, name: str) -> Format | None:
    """The format that defines an interface."""
    return next((one for one in FORMATS if one.describe(tree, name) is not None), None)


def usual(tree: Tree) -> Format | None:
    """The format that this host uses, for an interface that none defines yet. None if it uses none of them."""
    used = (
        (netplan, tree.list(netplan.DIRECTORY, "*.yaml")),
        (networkmanager, tree.list(networkmanager.DIRECTORY, "*")),
        (networkd, tree.list(networkd.OURS, "*.network")),
        (ifupdown, tree.read(ifupdown.MAIN)),
        (networkmanager, tree.exists(networkmanager.DIRECTORY)),
        (networkd, tree.exists(networkd.OURS)),
    )
    found: Format
    for found, there in used:
        if there:
            return found
    return None

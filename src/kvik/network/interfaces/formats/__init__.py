"""The configuration that a host keeps its interfaces in: one module a format, all with the same functions.

names(tree)                  the interfaces that it defines by name
describe(tree, name)         the document of one, None if it does not define it
define(tree, document)       -> Changes: replaced or added
undefine(tree, name)         -> Changes
bridge(tree, port, document) -> Changes: what `port` has goes to the bridge of `document`, whatever it is
unbridge(tree, name, port)   -> Changes: the way back
tell(tree, moves)            the commands that tell what runs that its files have changed, and interfaces moved
held(tree, name)             a command, and the word that it prints if what runs has made a bridge its own
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kvik.conf.interface import Interface
from kvik.network.interfaces.formats import ifupdown, netplan, networkd, networkmanager
from kvik.network.interfaces.formats.tree import Changes, Command, Move, Tree


class Format(Protocol):
    """What each module is."""

    @property
    def NAME(self) -> str: ...

    def names(self, tree: Tree) -> list[str]: ...
    def describe(self, tree: Tree, name: str) -> Interface | None: ...
    def define(self, tree: Tree, document: Interface) -> Changes: ...
    def undefine(self, tree: Tree, name: str) -> Changes: ...
    def bridge(self, tree: Tree, port: str, document: Interface) -> Changes: ...
    def unbridge(self, tree: Tree, name: str, port: str) -> Changes: ...
    def tell(self, tree: Tree, moves: Sequence[Move]) -> list[Command]: ...
    def held(self, tree: Tree, name: str) -> tuple[Command, str] | None: ...


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

"""What becomes of image files once a snapshot is gone: a pure function from who rests on what to steps.

A file is needed if a machine's disk or a snapshot is kept in it (it is a *top*), or if a needed file rests on it.
Of the files that snapshots made, those that nothing needs are removed. A needed file that is no top any more, and on
which exactly one other rests, is merged with that one:

    forward   its data goes up into the one that rests on it; then nothing needs it
    back      the data of the one that rests on it comes down into it; then it stands for that one

Neither changes what any top shows. A file that was there before the first snapshot (`original`) is never removed, so it
can only take data; any other file that snapshots did not make is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

__all__ = ["BACK", "FORWARD", "REMOVE", "Layer", "Step", "needed", "plan"]

FORWARD, BACK, REMOVE = "forward", "back", "remove"


class Layer(NamedTuple):
    """One image file. `allocated`: bytes that it takes; `pinned`: must stay what it is (a snapshot is inside it)."""

    path: str
    backing: str | None = None
    allocated: int = 0
    pinned: bool = False


class Step(NamedTuple):
    """`path` is the file that goes, `into` the one that then has its data; `size` bytes at most are copied."""

    kind: str
    path: str
    into: str = ""
    size: int = 0


def needed(layers: Mapping[str, Layer], tops: frozenset[str] | set[str]) -> set[str]:
    """The tops and all they rest on."""
    found: set[str] = set()
    for top in tops:
        path: str | None = top
        while path is not None and path not in found:
            found.add(path)
            path = layers[path].backing if path in layers else None
    return found


def plan(
    layers: Mapping[str, Layer],
    tops: set[str],
    made: set[str],
    originals: set[str],
    *,
    busy: Callable[[str], bool] = lambda path: False,
    can: Callable[[Step], bool] = lambda step: True,
) -> list[Step]:
    """The steps, in the order in which they are to be done. `tops` are paths; a top may lead to no known layer.

    `busy` files are not touched now: they are dealt with when they are free. `can` tells which merges are possible.
    """
    layers, tops = dict(layers), set(tops)
    made = {path for path in made if path in layers}
    steps: list[Step] = []
    while (step := _next(layers, tops, made, originals, busy=busy, can=can)) is not None:
        steps.append(step)
        gone = layers.pop(step.path)
        made.discard(step.path)
        if step.kind == FORWARD:
            into = layers[step.into]
            size = into.allocated + gone.allocated
            layers[step.into] = into._replace(backing=gone.backing, allocated=size)
        elif step.kind == BACK:
            into = layers[step.into]
            layers[step.into] = into._replace(allocated=into.allocated + gone.allocated)
            if step.path in tops:
                tops.discard(step.path)
                tops.add(step.into)
            for path, layer in layers.items():
                if layer.backing == step.path:
                    layers[path] = layer._replace(backing=step.into)
    return steps


def _next(
    layers: Mapping[str, Layer],
    tops: set[str],
    made: set[str],
    originals: set[str],
    *,
    busy: Callable[[str], bool],
    can: Callable[[Step], bool],
) -> Step | None:
    wanted = needed(layers, tops)
    # What rests on a file that is to go goes first: nothing ever rests on what is not there.
    below = {layer.backing for layer in layers.values()}
    for path in sorted(made - wanted, key=lambda path: (path in below, path)):
        if not busy(path) and not any(layer.backing == path for layer in layers.values()):
            return Step(REMOVE, path)
    for path in sorted(wanted):
        layer = layers.get(path)
        if layer is None or path in tops or layer.pinned or path not in made | originals:
            continue
        above = [other for other in layers.values() if other.backing == path]
        if len(above) != 1 or busy(path) or busy(above[0].path):
            continue
        top = above[0]
        choices = []
        if path in made:
            choices.append(Step(FORWARD, path, top.path, layer.allocated))
        if (
            top.path in made
            and not top.pinned
            and not any(busy(other.path) for other in layers.values() if other.backing == top.path)
        ):
            choices.append(Step(BACK, top.path, path, top.allocated))
        choices = [step for step in choices if can(step)]
        if choices:
            return min(choices, key=lambda step: (step.size, step.kind != FORWARD))
    return None

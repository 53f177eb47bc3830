"""The nearest known word to one that was mistyped. Imported only when something is already wrong."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable


def distance(left: str, right: str) -> int:
    """Edits (insert, drop, replace, swap of neighbours) from `left` to `right`: optimal string alignment."""
    before: list[int] = []
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        here = [i]
        for j, b in enumerate(right, 1):
            cost = min(row[j] + 1, here[j - 1] + 1, row[j - 1] + (a != b))
            if i > 1 and j > 1 and a == right[j - 2] and left[i - 2] == b:
                cost = min(cost, before[j - 2] + 1)
            here.append(cost)
        before, row = row, here
    return row[-1]


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The one of `known` most like `word`, or None if none is near: a third of its letters may differ."""
    lowered = word.lower()
    allowed = max(1, len(word) // 3)
    best: tuple[int, str] | None = None
    for candidate in sorted(known):
        if abs(len(candidate) - len(word)) > allowed and not candidate.lower().startswith(lowered):
            continue
        score = distance(lowered, candidate.lower())
        if candidate.lower().startswith(lowered) and len(word) >= 3:
            score = min(score, allowed)
        if score <= allowed and (best is None or score < best[0]):
            best = (score, candidate)
    return best[1] if best else None

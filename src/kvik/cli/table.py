"""Tables as virsh draws them, that fit the terminal.

One blank before each cell, two after it, a line of dashes below the header, nothing trailing. On a terminal that is
too narrow the widest columns are clipped; into a pipe nothing ever is, so scripts see whole values.
"""

from __future__ import annotations

from kvik.cli import term

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SMALLEST = 6  # cells that a clipped column keeps


class Table:
    """`Table("Id", "Name").add(1, "tiny-1").render()`."""

    def __init__(self, *headers: str) -> None:
        self.headers = headers
        self.rows: list[tuple[str, ...]] = []

    def add(self, *cells: object) -> Table:
        if len(cells) != len(self.headers):
            raise ValueError(f"{len(cells)} cells for {len(self.headers)} columns")
        self.rows.append(tuple(term.neutralise(str(cell)) for cell in cells))
        return self

    def dicts(self) -> list[dict[str, str]]:
        """The same rows for `--json`, keyed by the header in lower case with underscores."""
        keys = [header.lower().replace(" ", "_") for header in self.headers]
        return [dict(zip(keys, row, strict=True)) for row in self.rows]

    def render(
        self,
        *,
        header: bool = True,
        limit: int | None = None,
        colour: Callable[[int, str], str | None] | None = None,
    ) -> str:
        """The whole table, with its final newline.

        `limit` is the terminal's width in cells; `colour(column, text)` names a colour of `term.COLOURS` or None.
        """
        lines: list[Sequence[str]] = [self.headers, *self.rows] if header else list(self.rows)
        if not lines:
            return ""
        widths = [max(term.width(line[i]) for line in lines) for i in range(len(self.headers))]
        if limit is not None:
            values = [max((term.width(row[i]) for row in self.rows), default=0) for i in range(len(self.headers))]
            widths = fit(widths, limit, values)
        out = []
        for number, line in enumerate(lines):
            parts = []
            for i, cell in enumerate(line):
                text = term.clip(cell, widths[i])
                pad = " " * (widths[i] - term.width(text) + 2) if i < len(line) - 1 else ""
                is_header = header and number == 0
                shade = ("bold" if is_header else colour(i, cell)) if colour else None
                parts.append(f" {term.paint(text, shade)}{pad}")
            out.append("".join(parts).rstrip() if not parts[-1].strip() and colour else "".join(parts))
            if header and number == 0:
                # virsh draws a dash for every cell of every column with its three blanks
                out.append("-" * (sum(widths) + 3 * len(widths)))
        return "\n".join(out) + "\n"


def fit(widths: list[int], limit: int, values: list[int]) -> list[int]:
    """Column widths whose rows fit in `limit` cells, `SMALLEST` at least.

    Headers that are longer than the `values` below them give way first, then the widest columns.
    """
    widths = [min(width, limit) for width in widths]
    room = limit - 3 * len(widths)
    for least in (values, [0] * len(widths)):
        while sum(widths) > room:
            spare = [width - max(SMALLEST, least[i]) for i, width in enumerate(widths)]
            widest = max((i for i, count in enumerate(spare) if count > 0), key=widths.__getitem__, default=None)
            if widest is None:
                break
            widths[widest] -= 1
    return widths

"""Tables of results: with rich on a terminal, plain in a pipe, Markdown in a file."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec


@dataclass(frozen=True)
class Table:
    """A title, column heads, and rows of as many texts; the first column is on the left, the others on the right."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def plain(self) -> str:
        """Columns padded with blanks."""
        lines = [list(self.head), *map(list, self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = [
            [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))]
            for line in lines
        ]
        return "\n".join([self.title, *("  ".join(line).rstrip() for line in padded)])

    def markdown(self) -> str:
        """A heading and a table."""
        lines = [self.head, ["---"] + ["---:"] * (len(self.head) - 1), *self.rows]
        cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
        return "\n".join([f"## {self.title}", "", *(f"| {' | '.join(line)} |" for line in cells)])

    def show(self) -> None:
        """Print it."""
        if not (sys.stdout.isatty() and find_spec("rich")):
            print(f"\n{self.plain()}")
            return
        from rich import box, console, table, text

        out = table.Table(title=text.Text(self.title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        for i, name in enumerate(self.head):
            out.add_column(text.Text(name), justify="right" if i else "left")
        for row in self.rows:
            out.add_row(*map(text.Text, row))
        console.Console().print(out)


def percent(value: float) -> str:
    """Such as 12.3 %."""
    return f"{100 * value:.1f} %"


def cut(rows: Sequence[Sequence[str]], most: int) -> list[Sequence[str]]:
    """The first rows, and how many there are besides."""
    if len(rows) <= most:
        return list(rows)
    return [*rows[:most], [f"... {len(rows) - most} more", *[""] * (len(rows[0]) - 1)]]

"""The console tables: a loss is printed like a win."""

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import groupby
from typing import Any

HEAD = ("contestant", "ms", "quartiles", "rate", "of ceiling", "vs best rival", "extra MiB", "error", "grad error")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def speedup(row: dict[str, Any]) -> str:
    """Such as `2.10x (2.05-2.16)`: median and quartiles of the best rival's time over this one's."""
    s = row.get("speedup")
    return f"{s['median']:.2f}x ({s['q1']:.2f}-{s['q3']:.2f})" if s else "-"


def rate(row: dict[str, Any]) -> str:
    """GB/s or TFLOP/s."""
    return f"{row['GBps']:.1f} GB/s" if "GBps" in row else f"{row['TFLOPs']:.2f} TFLOP/s"


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """One contestant's line, in the order of HEAD."""
    if row["status"] != "ok":
        return (row["contestant"], row["status"], row["reason"], *[""] * (len(HEAD) - 3))
    ms = row["ms"]
    return (
        row["contestant"],
        f"{ms['median']:.3g}" if ms["median"] < 1000 else f"{ms['median']:.0f}",
        f"{ms['q1']:.3g}-{ms['q3']:.3g}" if ms["median"] < 1000 else f"{ms['q1']:.0f}-{ms['q3']:.0f}",
        rate(row),
        f"{100 * row['fraction']:.0f} %",
        speedup(row),
        _number(row.get("extra_MiB"), ".1f"),
        _number(row["error"], ".1e"),
        _number(row["gradient_error"], ".1e"),
    )


def races(result: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(title, rows) of each sample, dtype and mode."""

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["sample"], row["shape"], row["dtype"], row["mode"]

    entered = [row for row in result["rows"] if row["status"] != "absent"]
    for (sample, shape, dtype, mode), rows in groupby(entered, key):
        yield f"{result['op']}  {sample} {shape}  {dtype}  {mode}", list(rows)


def absences(result: dict[str, Any]) -> list[str]:
    """Who was not there, and why, each once."""
    absent = (row for row in result["rows"] if row["status"] == "absent")
    return list(dict.fromkeys(f"{row['contestant']} is absent: {row['reason']}" for row in absent))


def machine_lines(result: dict[str, Any]) -> list[str]:
    """The hardware, the versions and the ceilings."""
    hardware, ceilings = result["hardware"], result["ceilings"]
    copy = ceilings["copy_GBps"]
    lines = [
        f"{hardware.get('gpu', hardware['cpu'])}, {hardware['cores']} cores, {hardware['threads']} threads",
        ", ".join(f"{name} {number}" for name, number in result["versions"].items()),
        f"copy {copy['copy']:.1f} GB/s into an existing tensor, {copy['clone']:.1f} GB/s into a fresh one",
    ]
    if default := ceilings.get("copy_GBps_default_malloc"):
        lines[-1] += f" ({default['clone']:.1f} GB/s with malloc's default settings)"
    if "read_GBps" in ceilings:
        lines.append(f"reading {ceilings['read_GBps']:.1f} GB/s")
    lines.append("matmul " + ", ".join(f"{rate:.2f} TFLOP/s in {d}" for d, rate in ceilings["matmul_TFLOPs"].items()))
    return lines


def _plain(title: str, rows: list[tuple[str, ...]]) -> None:
    print(f"\n{title}")
    timed = [HEAD, *(row for row in rows if row[3])]
    widths = [max(map(len, column)) for column in zip(*timed, strict=True)]
    for row in (HEAD, *rows):
        texts = row if row in timed else row[:3]
        print("  ".join(t.ljust(w) for t, w in zip(texts, widths, strict=False)).rstrip())


def _rich(title: str, rows: list[tuple[str, ...]]) -> None:
    from rich import box, console, table

    out = table.Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for name in HEAD:
        out.add_column(name, justify="left" if name == HEAD[0] else "right")
    for row in rows:
        style = "green" if row[0].startswith("vlkern") else "red" if row[1] == "failed" else None
        out.add_row(*row, style=style)
    console.Console().print(out)


def show(result: dict[str, Any]) -> None:
    """Prints one op's tables: with rich on a terminal, as plain text in a pipe."""
    draw = _rich if sys.stdout.isatty() and find_spec("rich") else _plain
    for title, rows in races(result):
        draw(title, [cells(row) for row in rows])
    print("\n".join(["", *absences(result)]))

"""`python -m vlkern.bench.table [--check]`: the README's benchmark table and docs/numbers.md, from bench/results."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from vlkern.bench.report import HEAD, absences, cells, machine_lines, races, speedup
from vlkern.bench.rivals import RACES

START, END = "<!-- bench:start -->", "<!-- bench:end -->"
_COMMAND = "python -m vlkern.bench.table"


def load(root: Path) -> list[dict[str, Any]]:
    """Every result under root/bench/results, by hardware and op. Raises ValueError when there is none."""
    paths = sorted((root / "bench/results").glob("*/*.json"))
    paths = [path for path in paths if path.parent.name != "aot"]  # what compilers report, not times
    if not paths:
        raise ValueError(f"no results in {root / 'bench/results'}: run `vlkern bench` first")
    return [json.loads(path.read_text()) for path in paths]


def _line(values: tuple[str, ...] | list[str]) -> str:
    return "| " + " | ".join(v.replace("|", "\\|") for v in values) + " |"


def _memory(row: dict[str, Any]) -> str:
    value = row.get("extra_MiB")
    return "-" if value is None else f"{value:.0f} MiB" if value >= 10 else f"{value:.1f} MiB"


def _time(row: dict[str, Any]) -> str:
    return f"{row['ms']['median']:.3g} ms" if row["ms"]["median"] < 1000 else f"{row['ms']['median'] / 1000:.2f} s"


def _shape(row: dict[str, Any], op: str) -> str:
    """Of an op's first argument; the row of a model, or of an op without gradients, says by its sample what ran."""
    shape = " x ".join(map(str, row["shape"]))
    return (
        shape
        if op in RACES and len(RACES[op].share) > 1
        else f"{row['sample']}, {shape}" + (" (forward)" if row["mode"] == "forward" else "")
    )


def summary(results: list[dict[str, Any]]) -> str:
    """The README's table: our fastest backend against the fastest rival, with the backward where that was run."""
    head = [
        "op",
        "shape",
        "dtype",
        "vlkern",
        "best rival",
        "speed-up (quartiles)",
        "of ceiling",
        "extra memory: ours, rival's",
    ]
    parts = []
    for slug in dict.fromkeys(r["hardware"]["slug"] for r in results):
        mine = [r for r in results if r["hardware"]["slug"] == slug]
        hardware = mine[0]["hardware"]
        lines = [_line(head), _line(["---"] * len(head))]
        for result in mine:
            trained = {(row["sample"], row["dtype"]) for row in result["rows"] if row.get("mode") == "forward+backward"}
            for _, rows in races(result):
                if rows[0]["mode"] == "forward" and (rows[0]["sample"], rows[0]["dtype"]) in trained:
                    continue
                timed = [row for row in rows if row["status"] == "ok"]
                ours = min((r for r in timed if r["ours"]), key=lambda r: r["ms"]["median"], default=None)
                if ours is None:
                    continue
                beaten = "too slow to race" if any(row["status"] == "slow" for row in rows) else "none fits"
                rival = next((r for r in timed if r["contestant"] == ours["best_rival"]), None)
                lines.append(
                    _line(
                        [
                            f"`{result['op']}`",
                            _shape(ours, result["op"]),
                            ours["dtype"],
                            f"{_time(ours)} ({ours['contestant'].removeprefix('vlkern ')})",
                            f"{_time(rival)} ({rival['contestant']})" if rival else beaten,
                            speedup(ours),
                            f"{100 * ours['fraction']:.0f} % {result['ceiling']}",
                            f"{_memory(ours)}, {_memory(rival)}" if rival else _memory(ours),
                        ]
                    )
                )
        name = f"{hardware.get('gpu', hardware['cpu'])}, {hardware['cores']} cores"
        parts.append(f"Forward and backward on {name} (`{slug}`):\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def numbers(results: list[dict[str, Any]]) -> str:
    """docs/numbers.md: every contestant of every race, losses, failures and absences included."""
    parts = [
        "# Numbers",
        f"Generated from `bench/results` by `{_COMMAND}`. What the columns mean: [benchmarks.md](benchmarks.md).",
    ]
    for result in results:
        slug = result["hardware"]["slug"]
        parts.append(f"## {result['op']} on {slug}")
        parts.append("\n".join(f"- {line}" for line in machine_lines(result)))
        parts.append(f"![{result['op']} on {slug}](../bench/results/{slug}/{result['op']}.svg)")
        for title, rows in races(result):
            parts.append(f"### {title}")
            lines = [_line(HEAD), _line(["---"] * len(HEAD)), *(_line(cells(row)) for row in rows)]
            parts.append("\n".join(lines))
        parts += absences(result)
    return "\n\n".join(parts) + "\n"


def replaced(text: str, table: str) -> str:
    """`text` with what stands between the markers replaced. Raises ValueError without exactly one pair of markers."""
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise ValueError(f"README.md must hold {START} and {END} once each, in this order")
    return text[: text.index(START)] + f"{START}\n\n{table}\n\n" + text[text.index(END) :]


def main(argv: list[str] | None = None) -> int:
    """Rewrites README.md and docs/numbers.md; with --check only says whether they are up to date (exit status 1)."""
    parser = argparse.ArgumentParser(prog=_COMMAND, description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a file is out of date")
    parser.add_argument("--root", type=Path, default=Path(), help="the repository (default: the current folder)")
    args = parser.parse_args(argv)
    try:
        results = load(args.root)
        readme = args.root / "README.md"
        wanted = {
            readme: replaced(readme.read_text(), summary(results)),
            args.root / "docs/numbers.md": numbers(results),
        }
    except (OSError, ValueError) as problem:
        print(f"{_COMMAND}: {problem}", file=sys.stderr)
        return 2
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    for path in stale:
        if not args.check:
            path.write_text(wanted[path])
        print(f"{path} {'is out of date: run ' + _COMMAND if args.check else 'rewritten'}")
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())

"""`vlkern bench`: check, race, weigh, print, and write bench/results/<hardware>/."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vlkern.bench import report, runner
from vlkern.bench.case import ALL_DTYPES, samples_of
from vlkern.bench.rivals import RACES

_RESULTS = Path("bench/results")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vlkern bench`."""
    parser.add_argument("ops", nargs="*", metavar="op", help="ops to run (default: all)")
    parser.add_argument("--samples", nargs="+", default=[], metavar="NAME", help="samples of these ops, by name")
    parser.add_argument(
        "--dtypes", nargs="+", default=[], metavar="DTYPE", help="fp32, bf16, fp16 (default: fp32 bf16)"
    )
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="rounds, at least (default: 7)")
    parser.add_argument(
        "--quick", action="store_true", help="first sample, 3 rounds, no memory; writes only with --out"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument(
        "--malloc",
        choices=("recycle", "default"),
        default="recycle",
        help="CPU memory of all contestants (default: recycle)",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"where results go (default: {_RESULTS})")


def merged(new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """`new` plus those cases of `old` that it did not run, if machine, versions and settings are the same."""
    if any(new[key] != old.get(key) for key in ("schema", "hardware", "versions", "settings")):
        return new

    def case(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["sample"], tuple(row["shape"]), row["dtype"]  # a race of models names its batches alike

    ran = {case(row) for row in new["rows"]}
    rows = new["rows"] + [row for row in old["rows"] if case(row) not in ran]
    if new["op"] in RACES:
        samples = [sample.name for sample in samples_of(new["op"]).SAMPLES]
    else:  # a race of models, whose samples are named as they come
        samples = list(dict.fromkeys(row["sample"] for row in old["rows"] + new["rows"]))
    rows.sort(key=lambda row: (samples.index(row["sample"]), row["shape"], list(ALL_DTYPES).index(row["dtype"])))
    rates = {**old["ceilings"]["matmul_TFLOPs"], **new["ceilings"]["matmul_TFLOPs"]}
    return {**new, "ceilings": {**new["ceilings"], "matmul_TFLOPs": rates}, "rows": rows}


def write(result: dict[str, Any], folder: Path) -> list[Path]:
    """Writes <folder>/<hardware>/<op>.json and, where matplotlib is installed, <op>.svg and <op>.png."""
    folder = folder / result["hardware"]["slug"]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['op']}.json"
    if path.exists():
        result = merged(result, json.loads(path.read_text()))
    path.write_text(json.dumps(result, indent=1) + "\n")
    try:
        from vlkern.bench import plots
    except ImportError:
        return [path]
    return [path, *plots.draw(result, folder)]


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark. Returns the exit status: 2 after bad input, 1 when a contestant of ours was wrong, else 0."""
    try:
        settings = runner.settings(args.ops, args.samples, args.dtypes, args.repeats, args.device, args.quick)
        settings = replace(settings, recycle=args.malloc == "recycle")
    except ValueError as problem:
        print(f"vlkern bench: {problem}", file=sys.stderr)
        return 2
    results = runner.run(settings, say=lambda text: print(f"... {text}", file=sys.stderr, flush=True))
    folder = args.out or (None if args.quick else _RESULTS)
    print("\n".join(report.machine_lines(next(iter(results.values())))))
    for result in results.values():
        report.show(result)
        for path in write(result, folder) if folder else []:
            print(f"wrote {path}")
    return int(any(row["ours"] and row["status"] == "failed" for r in results.values() for row in r["rows"]))

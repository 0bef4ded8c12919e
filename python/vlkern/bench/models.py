"""Races of whole models: same weights in every library, outputs checked against float64, results as those of an op."""

import argparse
import copy
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlkern.bench import cli, machine, peers, report, timing
from vlkern.bench.case import DTYPES
from vlkern.bench.oracle import error, tolerance
from vlkern.bench.rivals import Absent
from vlkern.bench.runner import PATIENCE, SCHEMA, Row
from vlkern.models.siglip import TowerConfig

Call = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Event:
    """One race: `enter` makes name -> call for a dtype, `truth` gives the float64 output.

    work    of one call: FLOPs, or, where reading is the ceiling, bytes for a dtype
    """

    sample: str
    shape: list[int]
    mode: str
    work: float | Callable[[torch.dtype], float]
    enter: Callable[[torch.dtype], dict[str, Callable[[], Call]]]
    truth: Callable[[], torch.Tensor]


def blocks_flops(c: TowerConfig, tokens: int) -> float:
    """Of the blocks for one example: projections and MLP, 2 FLOPs a weight and token, and attention's two products."""
    weights = 4 * c.width**2 + 2 * c.width * c.mlp
    return float(c.depth * (2 * weights * tokens + 4 * tokens**2 * c.width))


def call_of(
    model: nn.Module, dtype: torch.dtype, inputs: Sequence[torch.Tensor], pick: Callable[[Any], torch.Tensor]
) -> Call:
    """`pick` of what a copy of the model in this dtype makes of the inputs."""
    model = copy.deepcopy(model).to(dtype).eval()
    arguments = [part.to(dtype) if part.is_floating_point() else part for part in inputs]

    def call() -> torch.Tensor:
        with torch.inference_mode():
            return pick(model(*arguments))

    return call


def _share(event: Event, dtype_name: str, ms: float, ceilings: dict[str, Any]) -> Row:
    """The rate of a call, and its share of the ceiling."""
    if callable(event.work):
        rate = 1e-6 * event.work(DTYPES[dtype_name]) / ms
        return {"GBps": rate, "fraction": rate / ceilings["read_GBps"]}
    rate = 1e-9 * event.work / ms
    return {"TFLOPs": rate, "fraction": rate / ceilings["matmul_TFLOPs"][dtype_name]}


def race(event: Event, dtype_name: str, ceilings: dict[str, Any], rounds: int) -> list[Row]:
    """All rows of one event in one dtype."""
    dtype, clock = DTYPES[dtype_name], timing.Clock("cpu")
    label = {"sample": event.sample, "shape": event.shape, "dtype": dtype_name, "mode": event.mode}
    want, rows, calls, errors = event.truth(), {}, {}, {}
    for name, make in event.enter(dtype).items():
        rows[name] = {**label, "contestant": name, "ours": name.startswith("vlkern"), "status": "ok"}
        try:
            call = make()
            off = error(call(), want)
            seconds = 1e-3 * clock(call)
        except Absent as reason:
            rows[name] |= {"status": "absent", "reason": str(reason)}
            continue
        if not off <= tolerance(dtype):
            rows[name] |= {"status": "failed", "reason": f"error {off:.1e}, allowed {tolerance(dtype):.1e}"}
        elif seconds > PATIENCE:
            rows[name] |= {"status": "slow", "reason": f"one call takes {seconds:.0f} s, so it was not raced"}
        else:
            calls[name], errors[name] = call, off
    times = timing.race(calls, clock, rounds)
    rivals = [name for name in calls if not rows[name]["ours"]]
    best = min(rivals, key=lambda n: timing.spread(times[n])["median"], default=None)
    for name, ms in times.items():
        spread = timing.spread(ms)
        rows[name] |= {"error": errors[name], "gradient_error": None, "ms": spread, "rounds": len(ms)}
        rows[name] |= {**_share(event, dtype_name, spread["median"], ceilings), "best_rival": best}
        rows[name]["speedup"] = timing.ratio(times[best], ms) if best else None
    return list(rows.values())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every race of models takes."""
    add = parser.add_argument
    add("--dtypes", nargs="+", default=["fp32", "bf16"], choices=("fp32", "bf16"))
    add("--repeats", type=int, default=7, help="rounds, at least (default: 7)")
    add("--malloc", choices=("recycle", "default"), default="recycle", help="as in `vlkern bench`")
    add("--out", type=Path, default=Path("bench/results"), metavar="DIR", help="where results go")


def run(
    name: str,
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    rivals: Sequence[str],
    events: Iterable[Callable[[], Event]],
    ceiling: str = "matmul",
) -> int:
    """Race, print, and write <out>/<hardware>/<name>.json with its plots.

    Args:
        name: of the results.
        parser: to say what is missing.
        args: what it parsed.
        rivals: packages, of which the first must be there.
        events: made one after the other, so that one set of models is in memory.
        ceiling: "matmul" or "read".
    """
    versions = machine.versions()
    for rival in rivals:
        try:
            versions[rival] = peers.load(rival).__version__
        except Absent as reason:
            if rival == rivals[0]:  # it gives every event its twin
                parser.error(str(reason))
    torch.manual_seed(0)
    recycle = args.malloc == "recycle"
    ceilings = machine.ceilings("cpu", {name: DTYPES[name] for name in args.dtypes}, recycle=recycle)
    if ceiling == "read":
        ceilings["read_GBps"] = machine.read_rate("cpu", 512)
    hardware = machine.hardware("cpu")
    hardware["slug"] += "" if recycle else "-default-malloc"
    rows: list[Row] = []
    for make in events:
        event = make()
        for dtype in args.dtypes:
            print(f"... {event.sample} {dtype}", file=sys.stderr, flush=True)
            rows += race(event, dtype, ceilings, args.repeats)
    settings = {"repeats": args.repeats, "device": "cpu", "quick": False}
    result = {
        "schema": SCHEMA, "hardware": hardware, "versions": versions, "settings": settings, "ceilings": ceilings,
        "op": name, "ceiling": ceiling, "rows": rows,
    }  # fmt: skip
    print("\n".join(report.machine_lines(result)))
    report.show(result)
    for path in cli.write(result, args.out):
        print(f"wrote {path}")
    return int(any(row["ours"] and row["status"] == "failed" for row in rows))

"""Runs the races: check every contestant, time the correct ones side by side, then weigh each alone."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from vlkern._op import REGISTRY
from vlkern.bench import machine, timing
from vlkern.bench.case import ALL_DTYPES, DTYPES, Case, Inputs, modes_of, samples_of
from vlkern.bench.memory import extra_memory
from vlkern.bench.oracle import errors, truth
from vlkern.bench.rivals import RACES, Absent, Contestant, Function

SCHEMA = 1
#: The pseudo-contestant that copies or reads as many bytes as the case moves, in the same rounds.
CEILING = "ceiling"
#: Who needs longer than this for one call is not raced: some CPUs have no fast bfloat16 matmul at all.
PATIENCE = 20.0
Row = dict[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What to run and how often."""

    ops: tuple[str, ...]
    samples: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    repeats: int = 7
    device: str = "cpu"
    quick: bool = False
    memory: bool = True
    recycle: bool = True


def _one_of(kind: str, names: Iterable[str], known: Iterable[str]) -> None:
    known = list(known)
    for name in names:
        if name not in known:
            raise ValueError(f"{kind} must be one of {', '.join(known)}, got {name!r}")


def settings(
    ops: Iterable[str] = (),
    samples: Iterable[str] = (),
    dtypes: Iterable[str] = (),
    repeats: int = 7,
    device: str = "cpu",
    quick: bool = False,
) -> Settings:
    """Checked settings; empty means the default. Ops go by their own or their public name.

    Raises ValueError naming what is unknown and listing what is known.
    """
    public = {REGISTRY[op].public: op for op in RACES}
    ops, samples, dtypes = tuple(ops), tuple(samples), tuple(dtypes)
    _one_of("op", ops, [*RACES, *(name for name in public if name not in RACES)])
    ops = tuple(dict.fromkeys(public.get(op, op) for op in ops)) or tuple(RACES)
    _one_of("sample", samples, [s.name for op in ops for s in samples_of(op).SAMPLES])
    _one_of("dtype", dtypes, DTYPES)
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    machine.check_device(device)
    chosen = dtypes or Settings.dtypes
    return Settings(ops, samples, chosen, min(repeats, 3) if quick else repeats, device, quick, not quick)


def cases(op: str, s: Settings) -> list[Case]:
    """The samples named, else those marked for benchmarks (with `quick` the first of them), in every dtype.

    A huge one has to be named.
    """
    default = [x.name for x in samples_of(op).SAMPLES if x.bench and not getattr(x, "huge", False)]
    picked = [x for x in samples_of(op).SAMPLES if x.name in (s.samples or default)]
    if s.quick and not s.samples:
        picked = picked[:1]
    floats = torch.float32 in REGISTRY[op].dtypes
    return [Case(op, x, ALL_DTYPES[d], s.device) for x in picked for d in (s.dtypes if floats else ("int32",))]


def _built(contestants: Iterable[Contestant]) -> tuple[dict[str, Function], dict[str, str]]:
    functions: dict[str, Function] = {}
    absent: dict[str, str] = {}
    for c in contestants:
        try:
            functions[c.name] = c.make()
        except Absent as reason:
            absent[c.name] = str(reason)
    return functions, absent


def _seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _checked(
    case: Case, inputs: Inputs, functions: dict[str, Function], mode: str, want: list[torch.Tensor]
) -> tuple[dict[str, list[float]], dict[str, Row]]:
    """Errors of the contestants that are right, and what keeps the others out of the race."""
    right: dict[str, list[float]] = {}
    out: dict[str, Row] = {}
    for name, function in functions.items():
        try:
            begin = time.perf_counter()
            right[name] = errors(case, inputs, want, function, mode)
            seconds = time.perf_counter() - begin
            if PATIENCE < seconds < 3 * PATIENCE:  # it may have been compiling
                seconds = _seconds(partial(inputs.run, function, mode))
            if seconds > PATIENCE and not case.huge:
                out[name] = {"status": "slow", "reason": f"one call takes {seconds:.0f} s, so it was not raced"}
        except Exception as problem:  # whatever a contestant does, the others race on
            out[name] = {"status": "failed", "reason": f"{type(problem).__name__}: {problem}".splitlines()[0][:200]}
    return right, out


def _ceiling_call(ceiling: str, nbytes: float, device: str) -> Callable[[], object]:
    if ceiling == "read":
        return machine.reader(torch.ones(int(nbytes) // 4, device=device))
    source = torch.ones(int(nbytes) // 8, device=device)
    return partial(torch.zeros_like(source).copy_, source)


def _rows(
    case: Case,
    inputs: Inputs,
    mode: str,
    ceilings: dict[str, Any],
    rounds: int,
    clock: timing.Clock,
    contestants: list[Contestant],
    functions: dict[str, Function],
    want: list[torch.Tensor],
) -> list[Row]:
    right, out = _checked(case, inputs, functions, mode, want)
    calls: dict[str, Callable[[], object]] = {n: partial(inputs.run, functions[n], mode) for n in right if n not in out}
    work, ceiling = case.work(inputs, mode), RACES[case.op].ceiling
    if ceiling != "matmul":
        calls[CEILING] = _ceiling_call(ceiling, work["bytes"], case.device)
    times = timing.race(calls, clock, 1 if case.huge else rounds, fixed=case.huge)
    rivals = [c.name for c in contestants if not c.ours and c.name in calls]
    best = min(rivals, key=lambda n: timing.spread(times[n])["median"], default=None)
    rows = []
    for c in contestants:
        row: Row = {"contestant": c.name, "ours": c.ours, "status": "ok"}
        if c.name in out:
            row |= out[c.name]
        elif c.name in calls:
            found, ms = right[c.name], times[c.name]
            outputs = len(found) - (len(inputs.leaves) if mode != "forward" else 0)
            row |= {"error": max(found[:outputs]), "gradient_error": max(found[outputs:], default=None)}
            row |= {"ms": timing.spread(ms), "rounds": len(ms)}
            median = row["ms"]["median"]
            if ceiling != "matmul":
                row |= {"GBps": 1e-6 * work["bytes"] / median, "fraction": timing.ratio(times[CEILING], ms)["median"]}
            else:
                rate = 1e-9 * work["flops"] / median
                row |= {"TFLOPs": rate, "fraction": rate / ceilings["matmul_TFLOPs"][case.dtype_name]}
            row["best_rival"] = best
            row["speedup"] = timing.ratio(times[best], ms) if best else None
        else:
            continue
        rows.append(row)
    return rows


def run_case(
    case: Case,
    s: Settings,
    ceilings: dict[str, Any],
    clock: timing.Clock,
    say: Say,
    contestants: list[Contestant] | None = None,
) -> list[Row]:
    """All rows of one case: mode by mode, contestant by contestant."""
    inputs = case.inputs()
    entered, refused = case.contestants(inputs)
    entered = entered if contestants is None else contestants
    functions, absent = _built(entered)
    absent |= refused
    want = truth(case, inputs)
    rows: list[Row] = []
    label = {"sample": case.sample.name, "shape": list(inputs.args[0].shape), "dtype": case.dtype_name}
    for mode in modes_of(case.op):
        say(f"{case.op} {case.sample.name} {case.dtype_name} {mode}")
        found = _rows(case, inputs, mode, ceilings, s.repeats, clock, entered, functions, want)
        rows += [{**label, "mode": mode, **row} for row in found]
    del want, inputs
    if s.memory:
        _add_memory(case, entered, rows, say)
    for name, reason in absent.items():
        rows.append(
            {**label, "contestant": name, "ours": name.startswith("vlkern"), "status": "absent", "reason": reason}
        )
    return rows


def _add_memory(case: Case, contestants: list[Contestant], rows: list[Row], say: Say) -> None:
    for c in contestants:
        mine = {row["mode"]: row for row in rows if row["contestant"] == c.name and row["status"] == "ok"}
        if not mine:
            continue
        say(f"{case.op} {case.sample.name} {case.dtype_name} memory of {c.name}")
        try:
            for mode, extra in extra_memory(case, c, tuple(mine)).items():
                mine[mode]["extra_MiB"] = extra / 2**20
        except (OSError, RuntimeError) as problem:
            for row in mine.values():
                row |= {"extra_MiB": None, "memory_reason": str(problem)}


def run(s: Settings, say: Say) -> dict[str, dict[str, Any]]:
    """op -> its results, as they are written to bench/results/<hardware>/<op>.json."""
    say("ceilings of this machine")
    ceilings = machine.ceilings(s.device, {d: DTYPES[d] for d in s.dtypes}, s.quick, s.recycle)
    hardware = machine.hardware(s.device)
    if not s.recycle:
        hardware["slug"] += "-default-malloc"
    head = {
        "schema": SCHEMA,
        "hardware": hardware,
        "versions": machine.versions(),
        "settings": {"repeats": s.repeats, "device": s.device, "quick": s.quick},
        "ceilings": ceilings,
    }
    clock = timing.Clock(s.device)
    results = {}
    for op in s.ops:
        rows = [row for case in cases(op, s) for row in run_case(case, s, ceilings, clock, say)]
        results[op] = {**head, "op": op, "ceiling": RACES[op].ceiling, "rows": rows}
    return results

"""The loss alone, fused against eager, over batch sizes: time and extra memory, measured now on this machine."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from vlkern.bench.case import Case
from vlkern.bench.memory import extra_memory
from vlkern.bench.rivals import RACES
from vlkern.bench.timing import Clock, race, spread
from vlkern.kernels.sigmoid_loss.samples import Sample

MODE = "forward+backward"
BATCHES = (256, 512, 1024, 2048, 4096)
#: Width of the embeddings: SigLIP's base size.
WIDTH = 768


@dataclass(frozen=True)
class Point:
    """One batch size: contestant -> milliseconds (median) and bytes of extra memory (peak - inputs - results)."""

    batch: int
    milliseconds: dict[str, float]
    extra_bytes: dict[str, int]

    @property
    def speedup(self) -> float:
        """Time of eager over time of fused."""
        return self.milliseconds["eager"] / self.milliseconds["fused"]


def _measure(case: Case) -> Point:
    inputs = case.inputs()
    contestants, _ = case.contestants(inputs)
    eager = next(c for c in RACES["sigmoid_loss"].rivals if c.name == "eager")
    pair = {"fused": contestants[0], "eager": eager}
    calls: dict[str, Callable[[], object]] = {name: partial(inputs.run, c.make(), MODE) for name, c in pair.items()}
    for call in calls.values():
        call()
    times = race(calls, Clock(case.device), rounds=5, fixed=True)
    return Point(
        case.sample.b,
        {name: spread(ms)["median"] for name, ms in times.items()},
        {name: extra_memory(case, c, (MODE,))[MODE] for name, c in pair.items()},
    )


def sweep(dtype: torch.dtype, device: str, batches: tuple[int, ...], width: int = WIDTH) -> Iterator[Point]:
    """Forward and backward of the loss on random unit vectors, one point after the other."""
    for batch in batches:
        yield _measure(Case("sigmoid_loss", Sample(f"demo_{batch}", batch, width), dtype, device))

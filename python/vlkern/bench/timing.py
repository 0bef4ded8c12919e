"""Times contestants side by side: one process, round-robin, cold caches, medians and quartiles."""

import gc
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

_MOST_ROUNDS, _SECONDS = 31, 3.0


def last_level_cache() -> int:
    """Bytes of the CPU's largest cache; 64 MiB where Linux does not tell."""
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(s[:-1]) << {"K": 10, "M": 20}[s[-1]] for s in sizes if s[-1] in "KM"), default=64 << 20)


class Clock:
    """Times one call at a time, after pushing everything out of the caches."""

    def __init__(self, device: str, cold: bool = True) -> None:
        self.device = device
        size = 2 * torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else last_level_cache()
        # float32, whose sum PyTorch reads in place: of integers it would write a wider copy.
        self._flush = torch.ones(size // 4 if cold else 0, dtype=torch.float32, device=device)

    def __call__(self, call: Callable[[], object]) -> float:
        """Milliseconds of `call()`."""
        if self.device == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            start.record()
            call()
            stop.record()
            torch.cuda.synchronize()
            return float(start.elapsed_time(stop))
        # Read, not written: dirty lines would be written back during the measurement.
        self._flush.sum()
        begin = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - begin)


def race(
    calls: Mapping[str, Callable[[], object]], clock: Clock, rounds: int, *, fixed: bool = False
) -> dict[str, list[float]]:
    """name -> milliseconds of each round. Fast contestants get more rounds (at most 31, 3 s) unless `fixed`."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    gc.collect()
    gc.disable()
    try:
        begin, done = time.perf_counter(), 0
        while done < rounds or (not fixed and done < _MOST_ROUNDS and time.perf_counter() - begin < _SECONDS):
            # Each round starts with another contestant, so that nobody always follows the same neighbour.
            for name in names[done % len(names) :] + names[: done % len(names)]:
                times[name].append(clock(calls[name]))
            done += 1
    finally:
        gc.enable()
    return times


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    q1, median, q3 = (float(q) for q in np.percentile(values, [25, 50, 75]))
    return {"median": median, "q1": q1, "q3": q3}


def ratio(slow: list[float], fast: list[float]) -> dict[str, float]:
    """Spread of slow / fast, taken round by round: whatever else the machine did then hit both."""
    return spread([a / b for a, b in zip(slow, fast, strict=True)])

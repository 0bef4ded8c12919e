"""Measures the pipeline on your shards: `python -m vlkern.data.speed SHARDS... [--size S]`."""

import argparse
import statistics
import time

from vlkern.data import PairShards, batches, load_tokenizer

_BATCH, _ROUNDS = 128, 5


def _rate(pairs: PairShards, workers: int) -> tuple[float, float]:
    """Pairs a second, and the microseconds of this process's CPU time that one costs: medians of several spans."""
    tokenizer = load_tokenizer("bytes", 64)
    stream = batches(pairs, _BATCH, tokenizer=tokenizer, workers=workers)
    for _ in range(2 * workers + 1):  # what the workers had read ahead does not count
        next(stream)
    seconds, busy = [], []
    for _ in range(_ROUNDS):
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(6):
            next(stream)
        seconds.append(time.perf_counter() - start)
        busy.append(time.process_time() - cpu)
    return 6 * _BATCH / statistics.median(seconds), 1e6 * statistics.median(busy) / (6 * _BATCH)


def main() -> None:
    """Print the time of the index and the rates with 0, 1 and 2 workers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shards", nargs="+", help="tar files, folders or patterns")
    parser.add_argument("--size", type=int, default=64, help="side of the pictures (64)")
    args = parser.parse_args()
    seconds = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        pairs = PairShards(args.shards, args.size)
        seconds.append(time.perf_counter() - start)
    print(f"index of {len(pairs)} pairs: {1e6 * statistics.median(seconds) / len(pairs):.0f} us a pair")
    for workers in (0, 1, 2):
        rate, cpu = _rate(pairs, workers)
        print(f"{workers} workers: {rate:.0f} pairs a second, {cpu:.0f} us of CPU time a pair in this process")


if __name__ == "__main__":
    main()

"""Measures the pipeline on your shards: `python -m vlkern.data.speed SHARDS... [--size S]`."""

import argparse
import statistics
import time

from vlkern.data import PairShards, batches, load_tokenizer

_BATCH, _ROUNDS = 128, 5


def _rate(pairs: PairShards, workers: int) -> float:
    """Pairs a second: the median of several spans of a stream in full swing."""
    tokenizer = load_tokenizer("bytes", 64)
    stream = batches(pairs, _BATCH, tokenizer=tokenizer, workers=workers)
    for _ in range(2 * workers + 1):  # what the workers had read ahead does not count
        next(stream)
    seconds = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        for _ in range(6):
            next(stream)
        seconds.append(time.perf_counter() - start)
    return 6 * _BATCH / statistics.median(seconds)


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
        print(f"{workers} workers: {_rate(pairs, workers):.0f} pairs a second")


if __name__ == "__main__":
    main()

"""Several ranks on this machine: one process each, joined by gloo, and a deadline for all of them."""

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import forks
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# A collective that waits this long is stuck; the deadline of the processes leaves room for their start.
COLLECTIVE = timedelta(seconds=30)


def launch(body: Callable[..., Any], ranks: int, folder: Path, *arguments: Any, seconds: float = 180) -> list[Any]:
    """`body(rank, ranks, *arguments)` on every rank; what each returned (tensors, numbers, strings, lists and dicts).

    A rank that raises takes the others with it and its traceback is shown. Nothing outlives `seconds`.
    """
    forks.context()
    given = (body, ranks, str(folder), arguments)
    context = mp.start_processes(_rank, given, ranks, join=False, start_method="forkserver")
    deadline = time.monotonic() + seconds
    try:
        while not context.join(timeout=1):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{body.__name__} on {ranks} ranks is still running after {seconds} s")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


def _rank(rank: int, body: Callable[..., Any], ranks: int, folder: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=COLLECTIVE)
    torch.save(body(rank, ranks, *arguments), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()

"""Processes forked from a server that has imported everything once: each is there in milliseconds, not in seconds."""

import multiprocessing
import os
import socket
from typing import Any

#: One server serves all tests of a run, so it imports what any of them needs. What is not installed is left out.
_PRELOAD = [
    "pytest",
    "torch._dynamo",
    "torch.distributed",
    "torch.utils.tensorboard",
    "vlkern.train.cli",
    "vlkern.train.jet",
    "vlkern.train.givt",
    "vlkern.train.navit",
    "vlkern.train.paligemma",
    "vlkern.train.siglip",
]


def context() -> Any:
    """As multiprocessing.get_context gives it."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(_PRELOAD)
    return found


def free_port() -> int:
    """Where the ranks of one run may meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def become(rank: int, world: int, port: int, output: str) -> None:
    """Give this process the environment that torchrun gives a rank, and send what it says to `output`.<rank>."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    handle = os.open(f"{output}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)

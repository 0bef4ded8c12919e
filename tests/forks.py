"""Processes forked from a server that has imported everything once: each is there in milliseconds, not in seconds."""

import multiprocessing
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

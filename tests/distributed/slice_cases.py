"""What each rank does in test_slices.py."""

from typing import Any

import torch
import torch.distributed as dist

import vlkern
from vlkern.ops import linear_cross_entropy, linear_log_probs
from vlkern.testing import differentiate

EVERYTHING = {"softcap": 3.0, "label_smoothing": 0.125, "z_loss": 0.01, "logit_scale": 0.5}
#: name -> (options, with bias, dtype). A rank holds 37 or 30 of 67 classes.
CASES = {
    "plain": ({}, False, torch.float32),
    "everything": (EVERYTHING, True, torch.float32),
    "tokens": ({**EVERYTHING, "reduction": "none"}, True, torch.float32),
    "sum float64": ({**EVERYTHING, "reduction": "sum"}, True, torch.float64),
    "bfloat16": ({"label_smoothing": 0.125}, False, torch.bfloat16),
}
CLASSES = 37


def whole(name: str) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    """The call with the whole vocabulary; every third token is ignored."""
    options, bias, dtype = CASES[name]
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(41, 24, generator=g, dtype=torch.float64).to(dtype)
    weight = torch.randn(67, 24, generator=g, dtype=torch.float64).to(dtype)
    target = torch.randint(67, (41,), generator=g)
    target[::3] = -100
    return (hidden, weight, target), {**options, **({"bias": torch.linspace(-1, 1, 67).to(dtype)} if bias else {})}


def part(rank: int, name: str) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    """The same with this rank's classes."""
    (hidden, weight, target), kwargs = whole(name)
    mine = slice(CLASSES, None) if rank else slice(CLASSES)
    if "bias" in kwargs:
        kwargs["bias"] = kwargs["bias"][mine]
    return (hidden, weight[mine], target), {**kwargs, "group": dist.group.WORLD}


def refusal(rank: int, change: str) -> str:
    """What a call says in which the last rank, or both, do something wrong."""
    (hidden, weight, target), kwargs = part(rank, "plain")
    if change == "hidden":
        hidden = hidden[:, : 24 - rank].contiguous()
        weight = weight[:, : 24 - rank].contiguous()
    elif change == "gradients":
        hidden.requires_grad_(rank == 1)
    else:
        target[5] = int(change)
    try:
        linear_cross_entropy(hidden, weight, target, **kwargs)
    except ValueError as error:
        return str(error)
    return "accepted"


def everything(rank: int, ranks: int, backends: list[str]) -> dict[str, Any]:
    """Outputs and gradients of every case on every backend, log-probabilities, refusals."""
    found: dict[str, Any] = {}
    for name in CASES:
        for backend in backends if CASES[name][2] != torch.float64 else ["reference"]:
            with vlkern.backend(f"linear_cross_entropy={backend}"):
                run = differentiate(linear_cross_entropy, *part(rank, name))
            found[f"{name} {backend}"] = [*run.outputs, *run.gradients]
    (hidden, weight, target), kwargs = part(rank, "plain")
    found["log probs"] = linear_log_probs(hidden, weight, target, **kwargs)
    found["refusals"] = {change: refusal(rank, change) for change in ("hidden", "gradients", "67", "-3")}
    return found

"""The options of `vlkern train`: what defines a run, and what may be chosen anew each time it is resumed."""

import argparse
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vlkern.train.ranks import PARALLEL

PRECISIONS = ("fp32", "bf16")


def _whole(low: int) -> Callable[[str], int]:
    """For argparse: a whole number from `low` on."""

    def parse(value: str) -> int:
        try:
            number = int(value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number, got {value!r}") from None
        if not low <= number < 2**63:
            raise argparse.ArgumentTypeError(f"must be from {low} to 2^63 - 1, got {value}")
        return number

    return parse


def number(low: float, high: float = math.inf, *, above: bool = False) -> Callable[[str], float]:
    """For argparse: a finite number from `low` on (`above` it) and at most `high`."""

    def parse(value: str) -> float:
        try:
            number = float(value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a number, got {value!r}") from None
        if not math.isfinite(number) or number < low or number > high or (above and number == low):
            limit = f"{'above' if above else 'at least'} {low:g}" + (
                f" and at most {high:g}" if high < math.inf else ""
            )
            raise argparse.ArgumentTypeError(f"must be {limit}, got {value}")
        return number

    return parse


positive = _whole(1)


def add_run(parser: argparse.ArgumentParser) -> None:
    """Where a run is, and how it is carried out: nothing here changes what is learned, beyond rounding."""
    run = parser.add_argument_group("the run")
    run.add_argument("--out", type=Path, required=True, metavar="RUN", help="folder of this run; new, or empty")
    run.add_argument(
        "--resume", action="store_true", help="continue the run in --out from its newest complete checkpoint"
    )
    run.add_argument("--save-every", type=_whole(1), default=500, metavar="N", help="steps between checkpoints (500)")
    run.add_argument("--keep", type=_whole(1), default=2, metavar="N", help="how many checkpoints stay (2)")
    run.add_argument("--log-every", type=_whole(1), default=10, metavar="N", help="steps between log records (10)")
    machine = parser.add_argument_group("the machine")
    machine.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 (a GPU if there is one)")
    machine.add_argument(
        "--parallel",
        choices=PARALLEL,
        default=PARALLEL[0],
        help="under torchrun: whole models (ddp, the default) or FSDP2",
    )
    machine.add_argument(
        "--workers", type=_whole(0), default=0, metavar="N", help="processes that read data, for each rank (0)"
    )


def add_learning(parser: argparse.ArgumentParser, defaults: Mapping[str, Any] | None = None) -> None:
    """How a recipe learns; a resumed run keeps what it began with. `defaults` of the recipe, where it has its own."""
    of_all = {
        "batch": 256, "lr": 1e-3, "weight_decay": 1e-4, "beta2": 0.95, "clip": 1,
        "precision": "bf16 where the machine is faster with it",
    }  # fmt: skip
    shown = {name: f"({value})" for name, value in {**of_all, **(defaults or {})}.items()}
    learning = parser.add_argument_group("learning")
    length = learning.add_mutually_exclusive_group()
    length.add_argument(
        "--steps", type=_whole(1), metavar="N", help="updates (as many as 100 passes over the data take)"
    )
    length.add_argument("--examples", type=_whole(1), metavar="N", help="or: pairs to see in all")
    learning.add_argument(
        "--batch", type=_whole(1), metavar="B", help=f"pairs in an update, over all ranks {shown['batch']}"
    )
    learning.add_argument("--lr", type=number(0, above=True), metavar="RATE", help=f"peak learning rate {shown['lr']}")
    learning.add_argument(
        "--warmup", type=_whole(0), metavar="N", help="steps until the peak (a twentieth of them, at most 20000)"
    )
    learning.add_argument(
        "--weight-decay", type=number(0), metavar="X",
        help=f"part of each matrix that a step takes away at the peak rate {shown['weight_decay']}",
    )  # fmt: skip
    learning.add_argument("--beta2", type=number(0, 1 - 1e-9), metavar="X", help=f"of Adam {shown['beta2']}")
    learning.add_argument(
        "--clip", type=number(0, above=True), metavar="X", help=f"largest norm of the gradient {shown['clip']}"
    )
    learning.add_argument("--precision", choices=PRECISIONS, help=f"of the towers {shown['precision']}")
    learning.add_argument("--seed", type=_whole(0), metavar="N", help="of parameters, order and augmentation (0)")


def add_tuning(parser: argparse.ArgumentParser) -> None:
    """What is learned of a model that was trained before."""
    tuning = parser.add_argument_group("fine-tuning")
    tuning.add_argument(
        "--freeze", action="append", choices=("image", "text"), help="leave a tower as it is; may be repeated"
    )
    tuning.add_argument("--lit", action="store_true", default=None, help="the same as --freeze image")
    tuning.add_argument(
        "--layer-decay", type=number(0, 1, above=True), metavar="X",
        help="multiply the rate by X for each block further from the loss (1)",
    )  # fmt: skip

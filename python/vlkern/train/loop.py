"""The loop that trains every recipe.

Which data a step sees, and what chance does in it, depends on the seed and the number of the step alone. So the state
of a run is its weights, its optimizer and that number, and a run that was killed ends with the same bits as one that
was not.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from vlkern._progress import say
from vlkern.errors import UserError
from vlkern.train.checkpoint import Checkpoints, Progress
from vlkern.train.log import Log, peak_memory
from vlkern.train.ranks import Ranks
from vlkern.train.task import Task
from vlkern.train.updates import update


@dataclass(frozen=True)
class Plan:
    """How a run goes.

    steps        updates in all
    batch        examples in an update, over all ranks
    clip         largest norm of the gradient
    autocast     run the objective in bfloat16 where that is safe
    parallel     "ddp" or "fsdp"
    seed         of what chance does inside the model
    save_every   steps between checkpoints, of which `keep` stay; there is one more at the end
    log_every    steps between records
    """

    steps: int
    batch: int
    clip: float
    autocast: bool
    parallel: str
    seed: int
    save_every: int
    keep: int
    log_every: int


class _Diverged(UserError):
    """Something is not finite any more."""

    def __init__(self, step: int, what: str) -> None:
        super().__init__(
            f"step {step}: {what}. Begin again with a lower --lr, a longer --warmup, a lower --clip or --precision "
            "fp32; checkpoints of earlier steps are kept"
        )


class _Watch:
    """Losses and norms, left on the device until they are looked at, and the time."""

    def __init__(self, ranks: Ranks, start: Progress) -> None:
        self._ranks, self._before = ranks, start.seconds
        self._pending: list[torch.Tensor] = []
        self._begin = self._lap = time.perf_counter()
        self._lap_step = start.step

    def add(self, loss: torch.Tensor, norm: torch.Tensor) -> None:
        """What a step gave."""
        self._pending.append(torch.stack([loss, norm]).float())

    def look(self, step: int, failed: bool) -> tuple[float, float, bool]:
        """Loss over all ranks and norm of the latest step, number `step`, and whether anything failed on any rank.

        Raises:
            UserError: a loss or a norm is not finite; on every rank.
        """
        flag = torch.full((1, 2), float(failed), device=self._pending[0].device)
        *rows, flags = self._ranks.mean(torch.cat([torch.stack(self._pending), flag])).tolist()
        first = step - len(rows) + 1
        self._pending.clear()
        for number, (loss, norm) in enumerate(rows, first):
            for name, value in (("loss", loss), ("norm of the gradient", norm)):
                if not math.isfinite(value):
                    raise _Diverged(number, f"the {name} is {value}")
        return rows[-1][0], rows[-1][1], flags[0] > 0

    def seconds(self) -> float:
        """Spent on this run so far, also before it was resumed."""
        return self._before + time.perf_counter() - self._begin

    def lap(self, step: int) -> float:
        """Steps per second since the last call."""
        now = time.perf_counter()
        speed = (step - self._lap_step) / (now - self._lap)
        self._lap, self._lap_step = now, step
        return speed


def _check_finite(model: nn.Module, ranks: Ranks, step: int) -> None:
    """Raises on every rank if a parameter is not: such a checkpoint would be of no use."""
    parts = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    finite = torch.stack([p.detach().isfinite().all() for p in parts]).all()
    if ranks.mean(finite.float()).item() < 1:
        raise _Diverged(step, "a parameter is not finite")


def _chance(seed: int, number: int, rank: int) -> None:
    """Seed PyTorch's generators: so their state need not be saved."""
    torch.manual_seed((seed * 0x9E3779B97F4A7C15 + number * 0xBF58476D1CE4E5B9 + rank) % 2**64)


def _update(
    objective: nn.Module, optimizer: torch.optim.Optimizer, task: Task, plan: Plan, number: int, batch: Any
) -> Any:
    """Loss and norm of one step. Ops look at their arguments, so one of them may be the first to meet an infinity."""
    try:
        return update(objective, optimizer, task.rate(number), batch, clip=plan.clip, autocast=plan.autocast)
    except ValueError as error:
        if "finite" in str(error):
            raise _Diverged(number + 1, str(error)) from error
        raise


def train(task: Task, plan: Plan, ranks: Ranks, folder: Path, run: str) -> None:
    """Train, or continue from the newest checkpoint in `folder`, and write the trained model to folder/model.

    Args:
        task: what to train.
        plan: how.
        ranks: where.
        folder: exists; gets log.jsonl, tensorboard/, checkpoints/ and model/.
        run: says which run this is; a checkpoint of another one is refused.

    Raises:
        UserError: the loss is not finite, or something could not be written. Checkpoints already there stay.
    """
    objective = ranks.spread(task.objective, task.blocks(), plan.parallel)
    optimizer = task.optimizer()
    checkpoints = Checkpoints(folder / "checkpoints", ranks, keep=plan.keep, run=run)
    left = checkpoints.clean()
    start = checkpoints.restore(task.model, optimizer)
    if ranks.first:
        if left:
            say("resume", f"removed unfinished checkpoints: {', '.join(left)}")
        if start.step:
            say("resume", f"after step {start.step} of {plan.steps}")
    with Log(folder, start.step, plan.steps, first=ranks.first) as log:
        try:
            if start.step < plan.steps:
                _steps(task, plan, ranks, objective, optimizer, checkpoints, start, log)
        finally:
            # Also after an error: the one being written is of a step that went well.
            checkpoints.finish()
    weights: dict[str, Any] = get_model_state_dict(
        task.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    ranks.agree(lambda: task.save(weights, folder / "model"))


def _steps(
    task: Task,
    plan: Plan,
    ranks: Ranks,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    checkpoints: Checkpoints,
    start: Progress,
    log: Log,
) -> None:
    watch = _Watch(ranks, start)
    for number, batch in zip(range(start.step, plan.steps), task.batches(start.step), strict=False):
        _chance(plan.seed, number, ranks.rank)
        watch.add(*_update(objective, optimizer, task, plan, number, task.prepare(batch, number)))
        step = number + 1
        last = step == plan.steps
        save, show = last or step % plan.save_every == 0, last or step == 1 or step % plan.log_every == 0
        # On a GPU looking means waiting for it.
        if save or show or ranks.device.type == "cpu":
            loss, norm, failed = watch.look(step, checkpoints.failed)
            if failed:
                checkpoints.finish()
        log.advance(step)
        if show:
            record = {"step": step, "loss": loss, "lr": task.rate(number), "grad_norm": norm, **task.numbers()}
            record["examples_per_second"] = watch.lap(step) * plan.batch
            log.write({**record, "seconds": watch.seconds(), "peak_memory": peak_memory(ranks.device)})
        if save:
            _check_finite(task.model, ranks, step)
            log.sync()
            checkpoints.save(Progress(step, watch.seconds()), task.model, optimizer)
        checkpoints.publish()

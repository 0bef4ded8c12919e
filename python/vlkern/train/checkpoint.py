"""Checkpoints of a run: written beside the training, complete or not there.

    checkpoints/step-500          complete: the folder has this name only after every rank has written all of its part
    checkpoints/step-600.tmp      being written, or left behind by a process that was killed

torch.distributed.checkpoint copies the state and writes the copy in a thread; it also cuts it anew when the number of
ranks or their arrangement has changed.
"""

import re
import shutil
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from vlkern._files import reason, sync
from vlkern.errors import UserError
from vlkern.train.ranks import Ranks

_COMPLETE = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Progress:
    """How far a run is: `step` updates done, `seconds` spent."""

    step: int = 0
    seconds: float = 0.0


class Checkpoints:
    """The checkpoints in `folder`, of which the newest `keep` stay. `run` says which run they belong to.

    Every method is called on every rank.
    """

    def __init__(self, folder: Path, ranks: Ranks, *, keep: int, run: str) -> None:
        self._folder, self._ranks, self._keep, self._run = folder, ranks, keep, run
        # Its messages travel in another thread than the training's, so they must not share a group.
        self._group = dist.new_group(backend="gloo")
        self._writing: tuple[int, Future[Any]] | None = None

    def steps(self) -> list[int]:
        """Of the complete ones, oldest first."""
        found = [_COMPLETE.fullmatch(path.name) for path in self._folder.glob("step-*")]
        return sorted(int(match[1]) for match in found if match)

    def clean(self) -> list[str]:
        """Remove what killed processes left behind; the names."""
        return self._ranks.agree(self._clean)

    def _clean(self) -> list[str]:
        left = sorted(self._folder.glob("step-*.tmp"))
        for path in left:
            shutil.rmtree(path)
        self._prune()
        return [path.name for path in left]

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
        """Load the newest complete checkpoint into both; without any, they stay as they are.

        Raises:
            UserError: it is damaged, or belongs to another run.
        """
        step = self._ranks.agree(lambda: max(self.steps(), default=0))
        if not step:
            return Progress()
        path = self._folder / f"step-{step}"
        weights, moments = get_state_dict(model, optimizer)
        state: dict[str, Any] = {"model": weights, "optimizer": moments, "seconds": 0.0, "run": ""}
        try:
            dcp.load(state, checkpoint_id=path, process_group=self._group)
        except (CheckpointException, Exception) as error:
            raise UserError(
                f"{path}: damaged checkpoint ({_why(error)}); remove it to resume from the one before"
            ) from error
        if state["run"] != self._run:
            raise UserError(f"{path}: belongs to another run than config.json beside it describes")
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(strict=True),
        )
        return Progress(step, state["seconds"])

    def save(self, progress: Progress, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Begin to write; returns when the state has been copied. The one before is finished first."""
        self.finish()
        part = self._part(progress.step)
        if self._ranks.first:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        weights, moments = get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": moments, "seconds": progress.seconds, "run": self._run}
        future = dcp.async_save(state, checkpoint_id=part, process_group=self._group)
        assert isinstance(future, Future)
        self._writing = progress.step, future

    @property
    def failed(self) -> bool:
        """Whether the one being written cannot be. Another rank may learn it later; `finish` raises on all of them."""
        return bool(self._writing and self._writing[1].done() and self._writing[1].exception())

    def publish(self) -> None:
        """Give the one being written its name, if it is complete by now."""
        if self._writing and self._writing[1].done() and not self._writing[1].exception():
            self.finish()

    def finish(self) -> None:
        """Wait for the one being written, give it its name and remove the oldest.

        Raises:
            UserError: it could not be written; those before are untouched.
        """
        if self._writing is None:
            return
        step, future = self._writing
        self._writing = None
        part = self._part(step)
        # The result comes after every rank has written its part and rank 0 the table of contents.
        if error := future.exception():
            free = self._ranks.agree(lambda: shutil.disk_usage(self._folder).free)
            if self._ranks.first:
                shutil.rmtree(part, ignore_errors=True)
            newest = max(self.steps(), default=None)
            kept = "there is none before it" if newest is None else f"the newest complete one is step-{newest}"
            raise UserError(
                f"{part.with_suffix('')}: cannot write this checkpoint ({_why(error)}; {free >> 20} MiB were free "
                f"there); {kept}"
            ) from error
        if self._ranks.first:
            part.rename(part.with_suffix(""))
            sync(self._folder)
            self._prune()

    def _prune(self) -> None:
        """Remove the oldest; renamed first, because a checkpoint that is half removed must not look complete."""
        for old in self.steps()[: -self._keep]:
            (self._folder / f"step-{old}").rename(self._part(old))
            shutil.rmtree(self._part(old))

    def _part(self, step: int) -> Path:
        return self._folder / f"step-{step}.tmp"


def _why(error: BaseException) -> str:
    """The cause in one line."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    # When a write fails, PyTorch's archive writer complains about its own position instead.
    return "a write failed" if "inline_container" in str(error) else reason(error)

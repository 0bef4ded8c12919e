"""The processes of a run: who this one is, how the model is spread over them, and sums over them.

One process starts as such; several are started by torchrun. A lone process has a process group too, so that everything
below has one form.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from vlkern.errors import UserError

PARALLEL = ("ddp", "fsdp")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Ranks:
    """This process is number `rank` of `world` and computes on `device`."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    @property
    def group(self) -> Any:
        """For losses that span the ranks; None when there is one rank."""
        return dist.group.WORLD if self.world > 1 else None

    def __str__(self) -> str:
        return f"{self.world} x {self.device.type}" if self.world > 1 else str(self.device)

    def part(self, batch: int) -> slice:
        """The rows of a global batch that are this rank's."""
        rows = batch // self.world
        return slice(self.rank * rows, (self.rank + 1) * rows)

    def spread(self, objective: nn.Module, blocks: Sequence[nn.Module], how: str) -> nn.Module:
        """The module to call instead of `objective`; gradients become means over the ranks.

        Args:
            objective: on the device, alike on every rank.
            blocks: parts of it that FSDP gathers one at a time.
            how: "ddp" (every rank holds the whole model) or "fsdp" (FSDP2: parameters, gradients and optimizer are cut
                into `world` parts).
        """
        if how == "fsdp":
            mesh = init_device_mesh(self.device.type, (self.world,))
            for block in blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(objective, mesh=mesh)
            return objective
        if self.world == 1:
            return objective
        return DistributedDataParallel(objective, device_ids=[self.device] if self.device.type == "cuda" else None)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean over ranks."""
        if self.world == 1:
            return values
        values = values.clone()
        dist.all_reduce(values)
        return values / self.world

    def agree(self, compute: Callable[[], _T]) -> _T:
        """What `compute` returns on rank 0, on every rank; a UserError there is raised everywhere."""
        result: list[Any] = [None, None]
        if self.first:
            try:
                result[0] = compute()
            except UserError as error:
                result[1] = str(error)
        if self.world > 1:
            dist.broadcast_object_list(result)
        if result[1] is not None:
            raise UserError(result[1])
        return result[0]


def _device(name: str | None) -> torch.device:
    local = dist.get_node_local_rank(fallback_rank=0)
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda":
            if not torch.cuda.is_available():
                raise UserError(f"--device {name}: PyTorch sees no GPU")
            device = torch.device("cuda", local if device.index is None else device.index)
            torch.cuda.set_device(device)
        torch.empty(0, device=device)
    except RuntimeError as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


@contextmanager
def join(device: str | None) -> Iterator[Ranks]:
    """Join the processes that torchrun started, or be alone.

    Args:
        device: "cpu", "cuda", "cuda:1"; None takes a GPU if there is one.

    Raises:
        UserError: this machine has no such device.
    """
    chosen = _device(device)
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" and dist.is_nccl_available() else "gloo"
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), chosen)
    finally:
        dist.destroy_process_group()

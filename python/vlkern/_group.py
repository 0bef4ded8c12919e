"""A process group as an op sees it."""

from typing import Any

import torch
import torch.distributed as dist


class Group:
    """The ranks of a group. Ranks are counted within it.

    Raises:
        TypeError: group is no ProcessGroup.
        ValueError: group cannot be used by this process.
    """

    def __init__(self, group: Any) -> None:
        if not dist.is_available():
            raise ValueError("group must be None: this PyTorch was built without torch.distributed")
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("group must contain this process, got a group of other ranks")
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"group must be a torch.distributed.ProcessGroup, got {type(group).__name__}")
        if not dist.is_initialized():
            raise ValueError("group must belong to an initialised torch.distributed, got one that was destroyed")
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    def gather(self, row: torch.Tensor) -> list[list[Any]]:
        """The rows [n] of all ranks, read on the host."""
        rows = [torch.empty_like(row) for _ in range(self.size)]
        dist.all_gather(rows, row, group=self.group)
        return [r.tolist() for r in rows]

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in float32 or better."""
        result = value.to(torch.promote_types(value.dtype, torch.float32), copy=True).contiguous()
        dist.all_reduce(result, group=self.group)
        return result

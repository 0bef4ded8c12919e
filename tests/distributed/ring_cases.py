"""What the ranks compute in the ring tests: every check of one world size in one start of its processes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vlkern
from vlkern.kernels.sigmoid_loss import ring
from vlkern.kernels.sigmoid_loss.samples import Sample, inputs
from vlkern.ops import sigmoid_contrastive_loss


@dataclass(frozen=True)
class Case:
    """`b` pairs of width `d` on each rank."""

    b: int
    d: int
    mask: str = ""
    contiguous: bool = True

    def whole(self, ranks: int, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The global batch, as arguments of the public function."""
        size = self.b * ranks
        sample = Sample("", size, self.d, scale=3.7, bias=-2.25, contiguous=self.contiguous)
        args, _ = inputs(sample, dtype, "cpu")
        slots = torch.arange(size)
        masks = {
            "": {},
            "slots": {"valid": slots % 3 != 1},  # another count on every rank, in general
            "sides": {"valid": (slots % 3 != 1, slots % 5 != 2)},
            "first rank empty": {"valid": slots >= self.b},
            "all empty": {"valid": slots < 0},
        }
        return args, masks[self.mask]

    def part(self, rank: int, ranks: int, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What one rank holds of it."""
        (image, text, scale, bias), kwargs = self.whole(ranks, dtype)
        rows = slice(rank * self.b, (rank + 1) * self.b)
        valid = kwargs.get("valid")
        if valid is not None:
            kwargs = {"valid": tuple(m[rows] for m in valid) if isinstance(valid, tuple) else valid[rows]}
        return (image[rows], text[rows], scale, bias), kwargs


CASES = {
    "odd": Case(13, 33),
    "one_pair_each": Case(1, 8),
    "strided": Case(9, 16, contiguous=False),
    "empty_slots": Case(13, 24, "slots"),
    "empty_slots_by_side": Case(11, 24, "sides"),
    "first_rank_empty": Case(7, 24, "first rank empty"),
    "all_empty": Case(5, 8, "all empty"),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def run(args: tuple[Any, ...], kwargs: dict[str, Any], group: Any) -> list[torch.Tensor]:
    """The loss and its gradients in image, text, scale and bias."""
    leaves = [t.detach().requires_grad_() for t in args]
    loss = sigmoid_contrastive_loss(*leaves, **kwargs, group=group)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def refusal(function: Any, *args: Any) -> str:
    try:
        function(*args)
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


class Peak(TorchDispatchMode):
    """The largest number of bytes alive at once in tensors that were created inside."""

    def __init__(self, *existing: torch.Tensor) -> None:
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in existing}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in self.known:
                storage = t.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.bytes = max(self.bytes, sum(nbytes for _, nbytes in self.alive.values()))
        return result


def memory(rank: int, ranks: int, dtype: torch.dtype) -> int:
    """Peak bytes of one call with gradients, inputs not counted; b D dominates everything else."""
    args, kwargs = Case(64, 256).part(rank, ranks, dtype)
    args = tuple(t.clone().requires_grad_() for t in args)
    with Peak(*args) as peak:
        sigmoid_contrastive_loss(*args, **kwargs, group=dist.group.WORLD)
    return peak.bytes


def memory_of_larger_rings(dtype: torch.dtype) -> dict[int, int]:
    """The same for rings of which this process computes one rank, while its own texts come back at every hop."""

    def echo(operations: Any) -> list[Any]:
        sends, receives = ([o.tensor for o in operations if o.op is op] for op in (dist.isend, dist.irecv))
        for sent, received in zip(sends, receives, strict=True):
            received.copy_(sent)
        return []

    def pretended(size: int) -> Any:
        def build(group: Any) -> ring._Ring:
            result = real(group)
            result.size = size
            return result

        return build

    real, peaks = ring._Ring, {}
    for size in (2, 3, 4, 5, 16, 64):
        with (
            mock.patch.object(ring, "_Ring", pretended(size)),
            mock.patch.object(ring, "_check_alike"),
            mock.patch.object(dist, "batch_isend_irecv", echo),
        ):
            peaks[size] = memory(0, 1, dtype)
    return peaks


@contextmanager
def events() -> Iterator[list[Any]]:
    """Bytes per batch of sends, and "block" for each block that was computed, in order."""
    log: list[Any] = []
    exchange, blocks = dist.batch_isend_irecv, ring.gradients_of_block

    def logged_exchange(operations: Any) -> Any:
        log.append(sum(o.tensor.nbytes for o in operations if o.op is dist.isend))
        return exchange(operations)

    def logged(block: Any) -> Any:
        def call(*args: Any) -> Any:
            log.append("block")
            return block(*args)

        return call

    with (
        mock.patch.object(dist, "batch_isend_irecv", logged_exchange),
        mock.patch.object(ring, "gradients_of_block", {name: logged(block) for name, block in blocks.items()}),
    ):
        yield log


class TwoTowers(torch.nn.Module):
    """The smallest model with an image side, a text side, a temperature and a bias."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(3)
        weights = [torch.randn(8, width, generator=g, dtype=torch.float64) / 3 for width in (12, 10)]
        self.image, self.text = (torch.nn.Parameter(w.to(dtype)) for w in weights)
        self.log_scale = torch.nn.Parameter(torch.tensor(1.0, dtype=dtype))
        self.bias = torch.nn.Parameter(torch.tensor(-2.0, dtype=dtype))

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, y = F.normalize(image @ self.image.T, dim=-1), F.normalize(text @ self.text.T, dim=-1)
        return x, y, self.log_scale.exp(), self.bias


def train(model: Any, dtype: torch.dtype, rows: slice, group: Any) -> list[torch.Tensor]:
    """Three steps on this rank's rows of a batch of 12; the losses."""
    g = torch.Generator().manual_seed(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    losses = []
    for _ in range(3):
        image, text = (torch.randn(12, width, generator=g, dtype=torch.float64).to(dtype)[rows] for width in (12, 10))
        loss = sigmoid_contrastive_loss(*model(image, text), group=group)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def distributed_data_parallel(rank: int, ranks: int, dtype: torch.dtype) -> dict[str, Any]:
    model = torch.nn.parallel.DistributedDataParallel(TwoTowers(dtype))
    rows = slice(rank * 12 // ranks, (rank + 1) * 12 // ranks)
    losses = train(model, dtype, rows, dist.group.WORLD)
    return {"losses": losses, "parameters": [p.detach() for p in model.parameters()]}


def refusals(rank: int, ranks: int) -> dict[str, str]:
    """Calls in which the last rank differs from the others."""
    world, odd = dist.group.WORLD, rank == ranks - 1
    pairs = torch.ones(4, 8)

    def call(image: torch.Tensor, valid: Any = None, scale: Any = 1.0) -> None:
        sigmoid_contrastive_loss(image, image, scale, 0.0, valid=valid, group=world)

    def backward() -> None:
        image = pairs.clone().requires_grad_()
        loss = sigmoid_contrastive_loss(image, image, 1.0, 0.0, group=world)
        (loss * (3 if odd else 2)).backward()

    return {
        "rows": refusal(call, torch.ones(5 if odd else 4, 8)),
        "columns": refusal(call, torch.ones(4, 9 if odd else 8)),
        "dtype": refusal(call, pairs.bfloat16() if odd else pairs),
        "valid": refusal(call, pairs, torch.ones(4, dtype=torch.bool) if odd else None),
        "gradients": refusal(call, pairs, None, torch.tensor(1.0, requires_grad=odd)),
        "grad_output": refusal(backward),
    }


def subgroup(rank: int, ranks: int) -> dict[str, Any]:
    """Every other rank, and for four ranks the rest as well, at the same time."""
    odd_ranks, even_ranks = [r for r in range(ranks) if r % 2], [r for r in range(ranks) if r % 2 == 0]
    groups = [dist.new_group(members) for members in (even_ranks, odd_ranks)]
    members = odd_ranks if rank % 2 else even_ranks
    case, place = CASES["empty_slots"], members.index(rank)
    return {
        "members": members,
        "result": run(*case.part(place, len(members), torch.float32), groups[rank % 2]),
        "outsider": refusal(run, *case.part(place, len(members), torch.float32), groups[1 - rank % 2]),
    }


def compiled(rank: int, ranks: int) -> list[torch.Tensor]:
    """Called from compiled code, with something to compile on either side."""

    def step(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return sigmoid_contrastive_loss(image, text, scale.log().exp(), bias, group=dist.group.WORLD) * 1

    args, _ = CASES["odd"].part(rank, ranks, torch.float32)
    leaves = [t.detach().requires_grad_() for t in args]
    loss = torch.compile(step, backend="aot_eager")(*leaves)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2, "nothing was compiled on either side"
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def everything(rank: int, ranks: int, backends: list[str]) -> dict[str, Any]:
    world = dist.group.WORLD
    results: dict[str, Any] = {}
    for backend in backends:
        with vlkern.backend(f"sigmoid_loss={backend}"):
            for name, case in CASES.items():
                for dtype_name, dtype in DTYPES.items():
                    args, kwargs = case.part(rank, ranks, dtype)
                    results[f"{backend} {name} {dtype_name}"] = run(args, kwargs, world)
                    results[f"{backend} {name} {dtype_name} again"] = run(args, kwargs, world)
                    with torch.no_grad():
                        results[f"{backend} {name} {dtype_name} loss"] = sigmoid_contrastive_loss(
                            *args, **kwargs, group=world
                        )
    args, kwargs = CASES["empty_slots"].part(rank, ranks, torch.float64)
    results["float64"] = run(args, kwargs, world)
    results["memory"] = {name: memory(rank, ranks, dtype) for name, dtype in DTYPES.items()}
    with events() as log:
        run(*Case(6, 10, "slots").part(rank, ranks, torch.bfloat16), world)
    results["events"] = log
    if ranks == 1:
        results["larger rings"] = {name: memory_of_larger_rings(dtype) for name, dtype in DTYPES.items()}
    if ranks == 2:
        results["compiled"] = compiled(rank, ranks)
    if ranks in (2, 3):
        towers = {"float64": torch.float64, "float32": torch.float32}
        results["ddp"] = {name: distributed_data_parallel(rank, ranks, dtype) for name, dtype in towers.items()}
    if ranks > 1:
        results["refusals"] = refusals(rank, ranks)
    if ranks > 2:
        results["subgroup"] = subgroup(rank, ranks)
    return results

"""A detector of leaks between packed documents."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlkern.packing.batch import PackedBatch

#: No seed that a user's data come from: numbers replaced by themselves would change nothing.
_SEED = 0x1501A7ED


class Leak(NamedTuple):
    """Document `changed` was changed, and an output of document `seen_in` moved by `by`."""

    changed: int
    seen_in: int
    by: float


class IsolationError(AssertionError):
    """Documents of a pack see each other; `leaks` lists every pair."""

    def __init__(self, leaks: list[Leak], batch: PackedBatch) -> None:
        self.leaks = leaks
        seen: dict[int, list[Leak]] = {}
        for leak in leaks:
            seen.setdefault(leak.changed, []).append(leak)
        lines = [
            f"changing document {d} changes {', '.join(str(leak.seen_in) for leak in found)}"
            f" (by up to {max(leak.by for leak in found):.3g})"
            for d, found in seen.items()
        ]
        headline = f"documents leak into each other, {len(leaks)} of the pairs among {len(batch)}:"
        super().__init__("\n".join([headline, *lines]))


def check_isolation(
    model: Callable[[PackedBatch], Any],
    batch: PackedBatch,
    *,
    tolerance: float = 0.0,
    fields: Sequence[str] | None = None,
) -> None:
    """Changes one document after the other: no output of any other document may move.

    Finds a forgotten mask, a pooling or a normalisation across documents, a convolution over their borders. Numbers in
    `tokens` and `parts` are replaced by others (floating point: random ones; integers: others of the same field, so
    that ids stay ids); lengths, spans and values stay.

    Args:
        model: takes the batch and gives a tensor [T, ...] or [S, ...], or a mapping or sequence of such; deterministic,
            so in eval mode. It is called S + 2 times, without gradients.
        batch: at least two documents, best of different lengths, on any device.
        tolerance: largest difference that is no leak. 0 is right on the CPU, where a row's result does not depend on
            the values of others; on a GPU as well, unless the kernels add in varying order.
        fields: names among `tokens` and `parts` to change; all by default. Leave out what says where documents are,
            such as segment ids.

    Raises:
        IsolationError: documents leak; an AssertionError with the pairs in `leaks`.
        ValueError: the check would prove nothing: fewer than two documents, unknown fields, outputs that are neither
            per token nor per document, a model that is not deterministic, or a document whose change moves no output of
            its own.

    Example:
        >>> batch = PackedBatch.of([Example({"x": torch.randn(n, 4)}) for n in (3, 2)])
        >>> check_isolation(lambda batch: batch.tokens["x"].tanh(), batch)
        >>> check_isolation(lambda batch: batch.tokens["x"].cumsum(0), batch)
        Traceback (most recent call last):
        vlkern.packing.isolation.IsolationError: documents leak into each other, 1 of the pairs among 2:
        changing document 0 changes 1 (by up to ...)
    """
    if len(batch) < 2:
        raise ValueError(f"batch must hold at least two documents, got {len(batch)}")
    if unknown := sorted(set(fields or ()) - {*batch.tokens, *batch.parts}):
        raise ValueError(f"fields must be among {sorted({*batch.tokens, *batch.parts})}, got {unknown}")
    with torch.no_grad():
        before = list(_outputs(model(batch), batch))
        again = list(_outputs(model(batch), batch))
        if any(_moved(a, b) > tolerance for x, y in zip(before, again, strict=True) for a, b in zip(x, y, strict=True)):
            raise ValueError("model must be deterministic, got other outputs for the same batch: is it in eval mode?")
        generator = torch.Generator().manual_seed(_SEED)
        leaks = []
        for d in range(len(batch)):
            after = list(_outputs(model(_changed(batch, d, fields, generator)), batch))
            moved = [max(_moved(x[e], y[e]) for x, y in zip(before, after, strict=True)) for e in range(len(batch))]
            if not moved[d]:
                raise ValueError(f"model must use its tokens, but changing document {d} moved none of its outputs")
            leaks += [Leak(d, e, by) for e, by in enumerate(moved) if e != d and by > tolerance]
    if leaks:
        raise IsolationError(leaks, batch)


def _outputs(result: Any, batch: PackedBatch) -> Iterator[Sequence[Tensor]]:
    """Every tensor of a model's result, cut into the S documents."""
    if isinstance(result, Mapping):
        result = list(result.values())
    if isinstance(result, (list, tuple)):
        for x in result:
            yield from _outputs(x, batch)
        return
    if not isinstance(result, Tensor) or result.dim() == 0 or len(result) not in (batch.total, len(batch)):
        got = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(f"model must give [{batch.total}, ...] or [{len(batch)}, ...], tokens or documents, got {got}")
    yield batch.split(result) if len(result) == batch.total else result.split(1)


def _moved(x: Tensor, y: Tensor) -> float:
    """Largest difference; NaN in the same places is none, NaN in one alone is infinitely much."""
    same = (x == y) | ((x != x) & (y != y))
    difference = (x.double() - y.double()).abs().nan_to_num(nan=torch.inf)
    return float(difference.masked_fill(same, 0.0).max()) if x.numel() else 0.0


def _changed(batch: PackedBatch, d: int, fields: Sequence[str] | None, generator: torch.Generator) -> PackedBatch:
    """The batch with other numbers in document d."""
    tokens, parts = dict(batch.tokens), dict(batch.parts)
    a, b = batch.cu_seqlens[d : d + 2].tolist()
    for name, x in tokens.items():
        if fields is None or name in fields:
            tokens[name] = _replaced(x, a, b, generator)
    for name, p in parts.items():
        if fields is None or name in fields:
            first, last = p.cu_seqlens[p.cu_parts[d : d + 2].long()].tolist()
            parts[name] = p._replace(values=_replaced(p.values, first, last, generator))
    return PackedBatch(batch.cu_seqlens, tokens, batch.spans, parts, batch.values)


def _replaced(x: Tensor, a: int, b: int, generator: torch.Generator) -> Tensor:
    """x with other numbers in the rows a to b - 1."""
    old = x[a:b]
    if x.is_floating_point() or x.is_complex():
        new = torch.randn(old.shape, generator=generator).to(x.device, x.dtype)
    else:
        known = x.long().unique()
        # Another one of the values that occur: never the old one, unless there is only one.
        step = torch.randint(1, max(len(known), 2), old.shape, generator=generator).to(x.device)
        new = known[(torch.searchsorted(known, old.long().contiguous()) + step) % len(known)].to(x.dtype)
    return torch.cat([x[:a], new, x[b:]])

"""Examples of several kinds of data as one packed batch, and back.

Shapes: S documents (one for each example), T tokens of all documents.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlkern import _checks


@dataclass(frozen=True, eq=False)
class Example:
    """One document of n tokens and what belongs to it; in a batch all examples have the same names.

    tokens  name -> [n, ...]: what every token has, such as ids, labels, patches, rows and columns; at least one name
    spans   name -> [m, 2] int32 or int64: starts and stops of ranges of its tokens, such as the images in a text; m may
            differ from example to example and be 0
    parts   name -> sequence of [k, ...]: pieces with tokens of their own, such as the patches of each of its images;
            any number, of any lengths above 0
    values  name -> one value for the whole example: a number, a tensor, or anything else, such as its name

    Raises:
        TypeError: something that must be a tensor is none, or spans are no integers.
        ValueError: there are no tokens, token fields differ in length, spans are not [m, 2] ranges inside the example,
            a part is empty.
    """

    tokens: Mapping[str, Tensor]
    spans: Mapping[str, Tensor] = field(default_factory=dict)
    parts: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.tokens:
            raise ValueError("tokens must have at least one field, got none")
        n = -1
        for name, x in self.tokens.items():
            if _checks.tensor(f"tokens[{name!r}]", x).dim() == 0 or len(x) == 0:
                raise ValueError(f"tokens[{name!r}] must have shape [n, ...] with n > 0, got {list(x.shape)}")
            if n not in (-1, len(x)):
                raise ValueError(f"tokens[{name!r}] must have {n} tokens as the fields before it, got {len(x)}")
            n = len(x)
        for name, x in self.spans.items():
            if _checks.tensor(f"spans[{name!r}]", x).dtype not in (torch.int32, torch.int64):
                raise TypeError(f"spans[{name!r}] must be int32 or int64, got {x.dtype}")
            if x.dim() != 2 or x.shape[1] != 2:
                raise ValueError(f"spans[{name!r}] must have shape [m, 2], got {list(x.shape)}")
            if _checks.values_may_be_read(x) and bool(((x[:, 0] > x[:, 1]) | (x < 0).any(1) | (x > n).any(1)).any()):
                raise ValueError(f"spans[{name!r}] must be ranges inside the {n} tokens, got {x.tolist()}")
        for name, pieces in self.parts.items():
            for i, x in enumerate(pieces):
                if _checks.tensor(f"parts[{name!r}][{i}]", x).dim() == 0 or len(x) == 0:
                    raise ValueError(f"parts[{name!r}][{i}] must have shape [k, ...] with k > 0, got {list(x.shape)}")

    def __len__(self) -> int:
        """n, its tokens."""
        return len(next(iter(self.tokens.values())))


class Spans(NamedTuple):
    """Ranges of tokens of all documents, as `vlkern.masks.spans` takes them.

    starts, stops  [M] int32, counted over all packed tokens
    cu_spans       [S + 1] int32: document d has the spans cu_spans[d] to cu_spans[d + 1] - 1
    """

    starts: Tensor
    stops: Tensor
    cu_spans: Tensor


class Parts(NamedTuple):
    """Pieces of all documents, packed in their turn.

    values      [P, ...], the pieces one behind the other; [0] when no document has any
    cu_seqlens  [pieces + 1] int32, where each piece starts
    cu_parts    [S + 1] int32: document d has the pieces cu_parts[d] to cu_parts[d + 1] - 1
    """

    values: Tensor
    cu_seqlens: Tensor
    cu_parts: Tensor


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Documents one behind the other, without padding. `PackedBatch.of` makes it; usable as a loader's `collate_fn`.

    cu_seqlens  [S + 1] int32, where each document starts and where the last one ends
    tokens      name -> [T, ...]
    spans       name -> Spans
    parts       name -> Parts
    values      name -> [S, ...], or a tuple of S things that are neither numbers nor tensors of one shape

    Example:
        >>> first = Example({"ids": torch.tensor([5, 6, 7])}, spans={"image": torch.tensor([[0, 2]])})
        >>> other = Example({"ids": torch.tensor([8, 9])}, spans={"image": torch.tensor([[1, 2]])})
        >>> batch = PackedBatch.of([first, other])
        >>> batch.tokens["ids"].tolist(), batch.cu_seqlens.tolist(), batch.positions.tolist()
        ([5, 6, 7, 8, 9], [0, 3, 5], [0, 1, 2, 0, 1])
        >>> batch.spans["image"].starts.tolist(), batch.spans["image"].stops.tolist()
        ([0, 4], [2, 5])
        >>> batch.unpack()[1].tokens["ids"]
        tensor([8, 9])
    """

    cu_seqlens: Tensor
    tokens: dict[str, Tensor]
    spans: dict[str, Spans]
    parts: dict[str, Parts]
    values: dict[str, Any]

    @classmethod
    def of(cls, examples: Sequence[Example]) -> "PackedBatch":
        """Packs examples in the order given.

        Args:
            examples: S >= 1 of them, with the same names and, under a name, tensors of one dtype, trailing shape and
                device.

        Raises:
            ValueError: there are none, or they do not fit together.
            TypeError: one is no Example.
        """
        if not examples:
            raise ValueError("examples must hold at least one example, got none")
        _same_names(examples)
        device = next(iter(examples[0].tokens.values())).device
        cu = _cumulative([len(e) for e in examples], device)
        tokens, spans, parts, values = {}, {}, {}, {}
        for name in examples[0].tokens:
            tokens[name] = _cat(f"tokens[{name!r}]", [e.tokens[name] for e in examples])
        for name in examples[0].spans:
            offsets = cu[:-1].tolist()
            shifted = torch.cat([e.spans[name] + offset for e, offset in zip(examples, offsets, strict=True)]).int()
            starts, stops = (t.contiguous() for t in shifted.unbind(1))
            spans[name] = Spans(starts, stops, _cumulative([len(e.spans[name]) for e in examples], device))
        for name in examples[0].parts:
            pieces = [piece for e in examples for piece in e.parts[name]]
            parts[name] = Parts(
                _cat(f"parts[{name!r}]", pieces) if pieces else torch.zeros(0, device=device),
                _cumulative([len(piece) for piece in pieces], device),
                _cumulative([len(e.parts[name]) for e in examples], device),
            )
        for name in examples[0].values:
            values[name] = _stack([e.values[name] for e in examples], device)
        return cls(cu, tokens, spans, parts, values)

    def __len__(self) -> int:
        """S, the documents."""
        return len(self.cu_seqlens) - 1

    @property
    def total(self) -> int:
        """T, the tokens of all documents."""
        return len(next(iter(self.tokens.values())))

    @property
    def positions(self) -> Tensor:
        """[T] int32: 0, 1, ... inside every document."""
        i = torch.arange(self.total, dtype=torch.int32, device=self.cu_seqlens.device)
        return i - self.cu_seqlens[torch.searchsorted(self.cu_seqlens[1:], i, right=True)]

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """[T, ...], such as a model's output -> S views [n, ...], one for each document. On a GPU this waits for it."""
        _checks.shape("x", x, (self.total, *x.shape[1:]))
        return x.split(self.cu_seqlens.diff().tolist())

    def unpack(self) -> list[Example]:
        """The examples, as views of the batch; numbers among `values` come back as tensors. On a GPU this waits."""
        cu = self.cu_seqlens.tolist()
        pieces = {
            name: (p.values.split(p.cu_seqlens.diff().tolist()), p.cu_parts.tolist()) for name, p in self.parts.items()
        }
        ranges = {name: (torch.stack([s.starts, s.stops], 1), s.cu_spans.tolist()) for name, s in self.spans.items()}
        return [
            Example(
                {name: x[a:b] for name, x in self.tokens.items()},
                {name: x[c[d] : c[d + 1]] - a for name, (x, c) in ranges.items()},
                {name: list(x[c[d] : c[d + 1]]) for name, (x, c) in pieces.items()},
                {name: x[d] for name, x in self.values.items()},
            )
            for d, (a, b) in enumerate(pairwise(cu))
        ]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PackedBatch":
        """The batch with all tensors on `device`."""
        return self.map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PackedBatch":
        """The batch in page-locked memory, from which copies to a GPU need not wait; a DataLoader calls it."""
        return self.map(lambda t: t.pin_memory())

    def map(self, f: Callable[[Tensor], Tensor]) -> "PackedBatch":
        """The batch with f(t) for each tensor t."""
        return PackedBatch(
            f(self.cu_seqlens),
            {name: f(x) for name, x in self.tokens.items()},
            {name: Spans(*map(f, x)) for name, x in self.spans.items()},
            {name: Parts(*map(f, x)) for name, x in self.parts.items()},
            {name: f(x) if isinstance(x, Tensor) else x for name, x in self.values.items()},
        )


def _same_names(examples: Sequence[Example]) -> None:
    for i, example in enumerate(examples):
        if not isinstance(example, Example):
            raise TypeError(f"examples must hold Examples, got {type(example).__name__} at {i}")
        for kind in ("tokens", "spans", "parts", "values"):
            ours, first = (sorted(getattr(e, kind)) for e in (example, examples[0]))
            if ours != first:
                raise ValueError(f"examples must have the same {kind}, {first} as the first one, got {ours} at {i}")


def _cumulative(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def _cat(name: str, tensors: Sequence[Tensor]) -> Tensor:
    first = tensors[0]
    for i, t in enumerate(tensors):
        kind, expected = (f"{x.dtype} [.., {', '.join(map(str, x.shape[1:]))}] on {x.device}" for x in (t, first))
        if kind != expected:
            raise ValueError(f"{name} must be {expected} as the first one, got {kind} at {i}")
    return torch.cat(list(tensors))


def _stack(values: list[Any], device: torch.device) -> Any:
    """[S, ...] of numbers or tensors of one shape and dtype, else a tuple."""
    first = values[0]
    if isinstance(first, Tensor):
        alike = all(
            isinstance(v, Tensor) and (v.shape, v.dtype, v.device) == (first.shape, first.dtype, first.device)
            for v in values
        )
        return torch.stack(values) if alike else tuple(values)
    if isinstance(first, (bool, int, float)) and all(type(v) is type(first) for v in values):
        return torch.tensor(values, device=device)
    return tuple(values)

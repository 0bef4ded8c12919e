"""What all masks share: the interval of each row, `&`, `|`, and when a union is an interval.

Shapes: Nq queries, Nk keys, S segments (documents).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vlkern import _checks

#: Further away than any key: the end of an interval without a bound on that side.
FAR = 2**40


class Rows(NamedTuple):
    """The queries whose intervals are asked for; all [Nq] int64.

    segment  number of the query's segment; S for a query behind the last one
    first    first key of that segment
    last     one past its last key
    own      the key that stands where the query stands: row i of a square mask, the segment's end aligned otherwise
    segments S
    keys     Nk; without it the end of the last segment, [] int64
    verify   may values be read and reported?
    """

    segment: Tensor
    first: Tensor
    last: Tensor
    own: Tensor
    segments: int
    keys: int | Tensor
    verify: bool


class Mask:
    """Which keys each query sees: one interval per row, computed when `bounds` is called.

    Masks compose: `a & b` lets through what both do, `a | b` what either does. Nothing is computed before `bounds`.

    Example:
        >>> mask = masks.causal() & masks.window(2)
        >>> start, stop = mask.bounds(4)
        >>> start.tolist(), stop.tolist()
        ([0, 0, 1, 2], [1, 2, 3, 4])
    """

    #: Positions that [start, stop] of every row contains unless the row is empty: "first" (of its segment), "own".
    #: Two intervals that share one of them overlap or lie side by side.
    _touches: frozenset[str] = frozenset()
    #: Every query sees its own key, so no row is empty.
    _sees_itself = False

    def bounds(
        self, Nq: int, Nk: int | None = None, *, device: torch.device | str | None = None
    ) -> tuple[Tensor, Tensor]:
        """The interval of each query, as `vlkern.ops.interval_attention` takes it.

        Time and memory O(Nq) (times the logarithm of the number of segments), nothing of size Nq x Nk; on a GPU
        nothing waits for the device.

        Args:
            Nq: number of queries.
            Nk: number of keys; Nq by default, and for `cross` the end of cu_k. With Nk != Nq and no `cross` the queries
                are the last Nq positions of the keys, as in a chunk of text behind its cache.
            device: where a mask without tensors is computed; other masks live on the device of their tensors.

        Returns:
            start, stop: [Nq] int32 each, contiguous, 0 <= start <= stop <= Nk. Query i sees start[i] <= j < stop[i];
            equal bounds mean that it sees no key.

        Raises:
            TypeError: Nq or Nk is no integer.
            ValueError: they are negative, do not fit the mask's tensors, `device` contradicts the tensors, or a row
                of a union has a gap. Checks that look at values run on CPU tensors in eager mode, elsewhere
                with `vlkern.validate(True)` or in `check`.
        """
        return self._bounds(Nq, Nk, device, _checks.values_may_be_read(*self._tensors()))

    def check(self, Nq: int, Nk: int | None = None) -> None:
        """Looks at all values, wherever they are; on a GPU this waits for the device, so call it once, not per step.

        Raises:
            TypeError, ValueError: as `bounds`, and always for values: documents that do not add up, overlapping
                spans, or a union that leaves a gap; the message names the first such row.
        """
        for part in self._leaves():
            part._verify()
        self._bounds(Nq, Nk, None, True)

    def __and__(self, other: "Mask") -> "Mask":
        return _And(self, other) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: "Mask") -> "Mask":
        return _Or(self, other) if isinstance(other, Mask) else NotImplemented

    def _bounds(
        self, Nq: int, Nk: int | None, device: torch.device | str | None, verify: bool
    ) -> tuple[Tensor, Tensor]:
        rows = self._rows(_count("Nq", Nq), None if Nk is None else _count("Nk", Nk), self._device(device), verify)
        start, stop = (t.clamp(min=0).clamp(max=rows.keys) for t in self._interval(rows))
        return start.int(), torch.maximum(start, stop).int()

    def _rows(self, Nq: int, Nk: int | None, device: torch.device | None, verify: bool) -> Rows:
        segments = self._segments()
        if segments is not None:
            return segments.rows(Nq, Nk, verify)
        i = torch.arange(Nq, device=device)
        zero, keys = torch.zeros_like(i), Nq if Nk is None else Nk
        return Rows(zero, zero, torch.full_like(i, keys), i + (keys - Nq), 1, keys, verify)

    def _device(self, wanted: torch.device | str | None) -> torch.device | None:
        tensors = self._tensors()
        device = None if wanted is None else torch.device(wanted)
        for t in tensors:
            if t.device != tensors[0].device:
                raise ValueError(f"the masks' tensors must be on one device, got {tensors[0].device} and {t.device}")
        if (
            tensors
            and device is not None
            and (device.type, device.index or 0)
            != (
                tensors[0].device.type,
                tensors[0].device.index or 0,
            )
        ):
            raise ValueError(f"device must be that of the mask's tensors, {tensors[0].device}, got {device}")
        return tensors[0].device if tensors else device

    # What each kind of mask says about itself.

    def _interval(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """start, stop [Nq] int64, not clipped to the keys; stop <= start means empty."""
        raise NotImplementedError

    def _leaves(self) -> "tuple[Mask, ...]":
        """The masks from which this one is composed."""
        return (self,)

    def _tensors(self) -> tuple[Tensor, ...]:
        return ()

    def _segments(self) -> "Segments | None":
        return None

    def _verify(self) -> None:
        """Raises ValueError for values that make no sense whatever Nq is."""


class Segments(Mask):
    """Query of segment s sees the keys of segment s. `documents` (queries are the keys) and `cross`."""

    _touches = frozenset({"first"})

    def __init__(self, names: tuple[str, str], cu_q: Tensor, cu_k: Tensor) -> None:
        self.names, self.source = names, (_cu_seqlens(names[0], cu_q), _cu_seqlens(names[1], cu_k))
        _checks.shape(names[1], cu_k, tuple(cu_q.shape))
        self.square = cu_q is cu_k
        if self.square:
            self._touches, self._sees_itself = frozenset({"first", "own"}), True
        if _checks.values_may_be_read(cu_q, cu_k):
            self._verify()

    def __repr__(self) -> str:
        return f"{'documents' if self.square else 'cross'}({len(self.source[0]) - 1} segments)"

    def count(self) -> int:
        """S."""
        return self.source[0].shape[0] - 1

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.source

    def _segments(self) -> "Segments":
        return self

    def _verify(self) -> None:
        for name, cu in zip(self.names, self.source, strict=True):
            if (begin := int(cu[0])) != 0:
                raise ValueError(f"{name} must start with 0, got {begin}")
            if (at := first_true(cu.diff() < 0)) is not None:
                raise ValueError(f"{name} must not decrease, got {int(cu[at])} before {int(cu[at + 1])} (entry {at})")

    def _interval(self, rows: Rows) -> tuple[Tensor, Tensor]:
        return rows.first, rows.last

    def rows(self, Nq: int, Nk: int | None, verify: bool) -> Rows:
        """The queries, each with its segment."""
        cu_q, cu_k = (cu.long().contiguous() for cu in self.source)
        if self.square and Nk not in (None, Nq):
            raise ValueError(f"Nk must be Nq, {Nq}, for documents, got {Nk}: cross() has queries that are not the keys")
        if verify:
            for name, cu, of, n in zip(self.names, (cu_q, cu_k), ("Nq", "Nk"), (Nq, Nk), strict=True):
                if n is not None and (end := int(cu[-1])) != n:
                    raise ValueError(f"{name} must end with {of}, {n}, got {end}")
        i = torch.arange(Nq, device=cu_q.device)
        # A query behind the last segment, which the check above refuses where it may look, gets segment S: no keys.
        segment = (torch.searchsorted(cu_q, i, right=True) - 1).clamp(min=0)
        behind = (segment + 1).clamp(max=self.count())
        first, last = cu_k[segment], cu_k[behind]
        own = i if self.square else last - (cu_q[behind] - i)
        keys = Nq if self.square else cu_k[-1] if Nk is None else Nk
        return Rows(segment, first, last, own, self.count(), keys, verify)


class _Pair(Mask):
    symbol = ""

    def __init__(self, left: Mask, right: Mask) -> None:
        self.left, self.right = left, right
        a, b = left._segments(), right._segments()
        if a is not None and b is not None and not all(x is y for x, y in zip(a.source, b.source, strict=True)):
            raise ValueError(f"a mask has one set of documents, got {a} and {b} from different tensors")
        self._of = a if a is not None else b

    def __repr__(self) -> str:
        return f"({self.left} {self.symbol} {self.right})"

    def _leaves(self) -> tuple[Mask, ...]:
        return (*self.left._leaves(), *self.right._leaves())

    def _tensors(self) -> tuple[Tensor, ...]:
        return (*self.left._tensors(), *self.right._tensors())

    def _segments(self) -> Segments | None:
        return self._of


class _And(_Pair):
    symbol = "&"

    def __init__(self, left: Mask, right: Mask) -> None:
        super().__init__(left, right)
        self._touches = left._touches & right._touches
        self._sees_itself = left._sees_itself and right._sees_itself

    def _interval(self, rows: Rows) -> tuple[Tensor, Tensor]:
        (a_start, a_stop), (b_start, b_stop) = self.left._interval(rows), self.right._interval(rows)
        return torch.maximum(a_start, b_start), torch.minimum(a_stop, b_stop)


class _Or(_Pair):
    symbol = "|"

    def __init__(self, left: Mask, right: Mask) -> None:
        super().__init__(left, right)
        # An operand that is never empty brings what it touches into every row.
        self._touches = left._touches & right._touches
        self._touches |= left._touches if left._sees_itself else frozenset()
        self._touches |= right._touches if right._sees_itself else frozenset()
        self._sees_itself = left._sees_itself or right._sees_itself

    def _interval(self, rows: Rows) -> tuple[Tensor, Tensor]:
        (a_start, a_stop), (b_start, b_stop) = self.left._interval(rows), self.right._interval(rows)
        if rows.verify and not self.left._touches & self.right._touches:
            self._no_gap(rows, a_start, a_stop, b_start, b_stop)
        a_empty, b_empty = a_stop <= a_start, b_stop <= b_start
        start = torch.where(a_empty, b_start, torch.where(b_empty, a_start, torch.minimum(a_start, b_start)))
        stop = torch.where(a_empty, b_stop, torch.where(b_empty, a_stop, torch.maximum(a_stop, b_stop)))
        return start, stop

    def _no_gap(self, rows: Rows, *bounds: Tensor) -> None:
        a_start, a_stop, b_start, b_stop = (t.clamp(min=0).clamp(max=rows.keys) for t in bounds)
        apart = torch.maximum(a_start, b_start) > torch.minimum(a_stop, b_stop)
        row = first_true(apart & (a_start < a_stop) & (b_start < b_stop))
        if row is not None:
            left, right = (f"[{int(s[row])}, {int(e[row])})" for s, e in ((a_start, a_stop), (b_start, b_stop)))
            raise ValueError(
                f"{self.left} | {self.right} is no interval: query {row} sees keys {left} by the first and {right} by"
                " the second, with a gap between them; merge two calls of interval_attention_lse instead"
            )


def first_true(condition: Tensor) -> int | None:
    """Index of the first True of a vector; reads the value."""
    return int(condition.int().argmax()) if bool(condition.any()) else None


def integers(name: str, value: Tensor) -> Tensor:
    """`value`, which must be a vector of int32 or int64."""
    t = _checks.tensor(name, value)
    if t.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {t.dtype}")
    if t.dim() != 1:
        raise ValueError(f"{name} must have one dimension, got shape {list(t.shape)}")
    return t


def _cu_seqlens(name: str, value: Tensor) -> Tensor:
    t = integers(name, value)
    if t.shape[0] == 0:
        raise ValueError(f"{name} must have shape [segments + 1], got [0]; without segments it holds one 0")
    return t


def _count(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{name} must not be negative, got {value}")
    return value

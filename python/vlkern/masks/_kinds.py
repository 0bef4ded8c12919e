"""The masks that models use, and the functions that make them."""

import torch
from torch import Tensor

from vlkern import _checks
from vlkern.masks._mask import FAR, Mask, Rows, Segments, first_true, integers

_MOST = 2**31 - 1


def documents(cu_seqlens: Tensor) -> Mask:
    """Packed documents: query i sees the document in which it lies, and no other.

    Args:
        cu_seqlens: [documents + 1] int32 (or int64), starts with 0 and does not decrease: document d holds the tokens
            cu_seqlens[d] to cu_seqlens[d + 1] - 1. A document may be empty; cu_seqlens[-1] is the number of tokens.

    Raises:
        TypeError, ValueError: not such a tensor.

    Example:
        >>> start, stop = masks.documents(torch.tensor([0, 3, 5], dtype=torch.int32)).bounds(5)
        >>> start.tolist(), stop.tolist()
        ([0, 0, 0, 3, 3], [3, 3, 3, 5, 5])
    """
    return Segments(("cu_seqlens", "cu_seqlens"), cu_seqlens, cu_seqlens)


def cross(cu_q: Tensor, cu_k: Tensor) -> Mask:
    """Cross-attention and pooling: a query of segment s sees the keys of segment s.

    Composed with `causal`, `window`, `spans` or `groups`, the queries of a segment stand at the segment's last keys, as
    a chunk of new tokens does behind its cache.

    Args:
        cu_q: [segments + 1] int32 (or int64), where the queries of each segment start; starts with 0.
        cu_k: [segments + 1], the same for the keys.

    Raises:
        TypeError, ValueError: not such tensors.

    Example:
        >>> one_probe_each = torch.arange(3, dtype=torch.int32)
        >>> start, stop = masks.cross(one_probe_each, torch.tensor([0, 3, 5], dtype=torch.int32)).bounds(2, 5)
        >>> start.tolist(), stop.tolist()
        ([0, 3], [3, 5])
    """
    return Segments(("cu_q", "cu_k"), cu_q, cu_k)


def causal() -> Mask:
    """Query i sees the keys up to its own: j <= i.

    Example:
        >>> masks.causal().bounds(3)
        (tensor([0, 0, 0], dtype=torch.int32), tensor([1, 2, 3], dtype=torch.int32))
    """
    return _Causal()


def window(left: int | None, right: int | None = None) -> Mask:
    """Sliding window: i - left < j < i + right. Both widths count the query itself; None is unbounded.

    `window(w)` limits only how far back a query sees: `causal() & window(w)` sees w keys, itself the last of them.
    `window(w, w)` is |i - j| < w, `window(None, 1)` is causal.

    Args:
        left: keys up to and with the query's own, at least 1, or None.
        right: keys from the query's own on, at least 1, or None.

    Raises:
        TypeError: a width is no integer.
        ValueError: it is below 1 or above 2^31 - 1.

    Example:
        >>> start, stop = masks.window(2, 3).bounds(5)
        >>> start.tolist(), stop.tolist()
        ([0, 0, 1, 2, 3], [3, 4, 5, 5, 5])
    """
    return _Window(_width("left", left), _width("right", right))


def prefix(lengths: Tensor) -> Mask:
    """Every query sees the first lengths[d] keys of its document d: with `causal() |`, a prefix language model.

    Args:
        lengths: [documents] int32 or int64, between 0 and the document's length. The documents are those of the mask of
            which this one is a part; without any, all tokens are one document, and lengths has one element.

    Raises:
        TypeError, ValueError: not such a tensor; `bounds` compares it with the documents.

    Example:
        >>> cu_seqlens, lengths = torch.tensor([0, 4, 7]), torch.tensor([2, 0])
        >>> mask = masks.documents(cu_seqlens) & (masks.causal() | masks.prefix(lengths))
        >>> start, stop = mask.bounds(7)
        >>> start.tolist(), stop.tolist()
        ([0, 0, 0, 0, 4, 4, 4], [2, 2, 3, 4, 5, 6, 7])
    """
    return _Prefix(lengths)


def spans(starts: Tensor, stops: Tensor) -> Mask:
    """Blocks of tokens, such as the images in a text, that see themselves in both directions.

    A query inside span m sees starts[m] <= j < stops[m]; a query outside every span sees nothing, so this mask is used
    as `causal() | spans(...)`.

    Args:
        starts: [M] int32 or int64, first token of each span, counted over all packed tokens.
        stops: [M], one past its last token. Spans are in ascending order and do not overlap; one may be empty.

    Raises:
        TypeError, ValueError: not such tensors; `bounds` compares the last with the number of keys.

    Example:
        >>> start, stop = (masks.causal() | masks.spans(torch.tensor([1]), torch.tensor([4]))).bounds(5)
        >>> start.tolist(), stop.tolist()
        ([0, 0, 0, 0, 0], [1, 4, 4, 4, 5])
    """
    return _Spans(starts, stops)


def groups(sizes: Tensor) -> Mask:
    """Group-causal: every query sees all keys up to the end of its own group, as when a group is predicted at once.

    Args:
        sizes: [G] int32 or int64, tokens of each group; groups follow one another over all packed tokens, and the sizes
            add up to their number. A group may be empty.

    Raises:
        TypeError, ValueError: not such a tensor; `bounds` compares the sum with the number of keys.

    Example:
        >>> start, stop = masks.groups(torch.tensor([1, 2, 2])).bounds(5)
        >>> start.tolist(), stop.tolist()
        ([0, 0, 0, 0, 0], [1, 3, 3, 5, 5])
    """
    return _Groups(sizes)


class _Causal(Mask):
    _touches, _sees_itself = frozenset({"first", "own"}), True

    def __repr__(self) -> str:
        return "causal()"

    def _interval(self, rows: Rows) -> tuple[Tensor, Tensor]:
        # Of more queries than keys in a segment of cross(), the first ones stand before it and see none of its keys.
        return torch.full_like(rows.own, -FAR), torch.maximum(rows.own + 1, rows.first)


class _Window(Mask):
    _touches, _sees_itself = frozenset({"own"}), True

    def __init__(self, left: int | None, right: int | None) -> None:
        self.left, self.right = left, right

    def __repr__(self) -> str:
        return f"window({self.left}, {self.right})"

    def _interval(self, rows: Rows) -> tuple[Tensor, Tensor]:
        back, ahead = (FAR if width is None else width for width in (self.left, self.right))
        return rows.own - back + 1, rows.own + ahead


class _Prefix(Mask):
    _touches = frozenset({"first"})

    def __init__(self, lengths: Tensor) -> None:
        self.lengths = integers("lengths", lengths)
        if _checks.values_may_be_read(lengths):
            self._verify()

    def __repr__(self) -> str:
        return f"prefix({len(self.lengths)} lengths)"

    def _tensors(self) -> tuple[Tensor, ...]:
        return (self.lengths,)

    def _verify(self) -> None:
        if (at := first_true(self.lengths < 0)) is not None:
            raise ValueError(f"lengths must not be negative, got lengths[{at}] = {int(self.lengths[at])}")

    def _interval(self, rows: Rows) -> tuple[Tensor, Tensor]:
        if len(self.lengths) != rows.segments:
            what = "one for each document" if rows.segments != 1 else "one: without documents all tokens are one"
            raise ValueError(f"lengths must have shape [{rows.segments}], {what}, got {list(self.lengths.shape)}")
        # A query behind the last document has no prefix.
        length = torch.nn.functional.pad(self.lengths.long(), (0, 1))[rows.segment]
        stop = rows.first + length
        if rows.verify and (at := first_true(stop > rows.last)) is not None:
            d, most = int(rows.segment[at]), int(rows.last[at] - rows.first[at])
            raise ValueError(f"lengths must not exceed the document, {most} keys, got lengths[{d}] = {int(length[at])}")
        return rows.first, stop


class _Spans(Mask):
    _touches = frozenset({"own"})

    def __init__(self, starts: Tensor, stops: Tensor) -> None:
        self.starts, self.stops = integers("starts", starts), integers("stops", stops)
        _checks.shape("stops", stops, tuple(starts.shape))
        if _checks.values_may_be_read(starts, stops):
            self._verify()

    def __repr__(self) -> str:
        return f"spans({len(self.starts)})"

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.starts, self.stops

    def _verify(self) -> None:
        starts, stops = self.starts, self.stops
        if len(starts) and int(starts[0]) < 0:
            raise ValueError(f"starts must not be negative, got starts[0] = {int(starts[0])}")
        if (at := first_true(stops < starts)) is not None:
            raise ValueError(
                f"stops must not lie before starts, got span {at} from {int(starts[at])} to {int(stops[at])}"
            )
        if (at := first_true(starts[1:] < stops[:-1])) is not None:
            raise ValueError(
                f"starts must ascend and spans must not overlap, got a span that stops at {int(stops[at])} before one"
                f" that starts at {int(starts[at + 1])} (spans {at} and {at + 1})"
            )

    def _interval(self, rows: Rows) -> tuple[Tensor, Tensor]:
        if rows.verify and len(self.stops) and (end := int(self.stops[-1])) > int(rows.keys):
            raise ValueError(f"stops must not exceed Nk, {int(rows.keys)}, got stops[{len(self.stops) - 1}] = {end}")
        # An empty span before the first key, so that there is one to look up for every query.
        starts, stops = (torch.nn.functional.pad(t.long(), (1, 0), value=-1) for t in (self.starts, self.stops))
        span = (torch.searchsorted(starts, rows.own, right=True) - 1).clamp(min=0)
        start, stop = starts[span], stops[span]
        return start, torch.where(rows.own < stop, stop, start)


class _Groups(Mask):
    _touches, _sees_itself = frozenset({"first", "own"}), True

    def __init__(self, sizes: Tensor) -> None:
        self.sizes = integers("sizes", sizes)
        if _checks.values_may_be_read(sizes):
            self._verify()

    def __repr__(self) -> str:
        return f"groups({len(self.sizes)})"

    def _tensors(self) -> tuple[Tensor, ...]:
        return (self.sizes,)

    def _verify(self) -> None:
        if (at := first_true(self.sizes < 0)) is not None:
            raise ValueError(f"sizes must not be negative, got sizes[{at}] = {int(self.sizes[at])}")

    def _interval(self, rows: Rows) -> tuple[Tensor, Tensor]:
        ends = torch.nn.functional.pad(self.sizes.long().cumsum(0), (1, 0))
        if rows.verify and (total := int(ends[-1])) != int(rows.keys):
            raise ValueError(f"sizes must add up to Nk, {int(rows.keys)}, got {total}")
        group = torch.searchsorted(ends, rows.own, right=True).clamp(max=len(self.sizes))
        # As in causal(), a query before its segment's keys sees none of them.
        return torch.full_like(rows.own, -FAR), torch.maximum(ends[group], rows.first)


def _width(name: str, value: int | None) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer or None, got {type(value).__name__}")
    if not 1 <= value <= _MOST:
        raise ValueError(f"{name} counts the query itself and must be between 1 and {_MOST}, got {value}")
    return value

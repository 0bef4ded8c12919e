"""Interleaved rANS: symbols with tables of probabilities to bytes and back; the arithmetic is in csrc/host/rans.h."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from vlkern import _checks
from vlkern._native import host
from vlkern.coding import gpu
from vlkern.coding.errors import DamagedStream
from vlkern.coding.mixtures import Mixtures
from vlkern.coding.tables import Tables

KINDS = ("rans64", "rans_byte", "rans_word")
_MOST_COMPONENTS = 16
_CPU = torch.device("cpu")


def _integers(name: str, value: Any, device: torch.device = _CPU) -> torch.Tensor:
    t = _checks.tensor(name, value)
    if t.dtype not in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64):
        raise TypeError(f"{name} must be integers, got {t.dtype}")
    if t.dtype == torch.int64 and t.numel() and not -(2**31) <= int(t.min()) <= int(t.max()) < 2**31:
        raise ValueError(f"{name} must fit in 32 bits, got {int(t.min())} to {int(t.max())}")
    return t.to(device, torch.int32).contiguous()


def _rows(tables: Tables, index: torch.Tensor | None, count: int, device: torch.device = _CPU) -> torch.Tensor | None:
    """The row of each symbol, None where there is one for each."""
    if index is None:
        if len(tables.cdf) != count:
            raise ValueError(
                f"index must be given, or tables have a row for each symbol: {len(tables.cdf)} and {count}"
            )
        return None
    rows = _integers("index", index, device).flatten()
    if len(rows) != count:
        raise ValueError(f"index must have an entry for each of the {count} symbols, got {len(rows)}")
    return rows


def _array(rows: torch.Tensor | None) -> Any:
    """As the coder takes them."""
    return None if rows is None else rows.numpy()


def _mixtures(mixtures: Mixtures) -> tuple[list[torch.Tensor], torch.Size]:
    """The parameters [rows, K, C], and the shape of the symbols."""
    shape = _checks.tensor("means", mixtures.means).shape
    if len(shape) < 2 or not 1 <= shape[-2] <= _MOST_COMPONENTS:
        raise ValueError(f"means must have shape [..., K, C] with K from 1 to {_MOST_COMPONENTS}, got {list(shape)}")
    for name, part, dtype in zip(Mixtures._fields, mixtures, (torch.int32, torch.uint8, torch.int16), strict=True):
        if _checks.tensor(name, part).dtype != dtype:
            raise TypeError(f"{name} must be {str(dtype).removeprefix('torch.')}, got {part.dtype}")
        _checks.shape(name, part, shape)
    rows = math.prod(shape[:-2])
    return [part.contiguous().view(rows, *shape[-2:]) for part in mixtures], shape[:-2] + shape[-1:]


def _arrays(parts: list[torch.Tensor]) -> list[Any]:
    """As the coder takes them."""
    return [part.cpu().numpy() for part in parts]


def _symbols_of(mixtures: Mixtures, symbols: torch.Tensor) -> tuple[torch.Tensor, list[Any]]:
    parts, shape = _mixtures(mixtures)
    _checks.shape("symbols", _checks.tensor("symbols", symbols), shape)
    return _integers("symbols", symbols).flatten(), _arrays(parts)


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")


@contextmanager
def _damage() -> Iterator[None]:
    try:
        yield
    except host().Damaged as error:
        raise DamagedStream(str(error)) from None


class Encoder:
    """One stream, for models that need what was coded before to say how probable the next symbols are.

    Args:
        lanes, kind: as for `encode`.
        precision: of all tables that are used.

    Raises:
        ValueError: one of them is out of range.

    Example:
        >>> tables = vlkern.coding.gaussian_tables()
        >>> encoder = vlkern.coding.Encoder()
        >>> for symbols in (torch.tensor([1, -2]), torch.tensor([0])):
        ...     encoder.put(symbols, tables, torch.full_like(symbols, 20))
        >>> decoder = vlkern.coding.Decoder(encoder.finish())
        >>> decoder.get(tables, torch.full((2,), 20)), decoder.get(tables, torch.full((1,), 20))
        (tensor([ 1, -2], dtype=torch.int32), tensor([0], dtype=torch.int32))
        >>> decoder.finish()
    """

    def __init__(self, *, lanes: int = 2, kind: str = "rans64", precision: int = 16) -> None:
        _check_kind(kind)
        self._precision = precision
        self._native = host().RansEncoder(kind, precision, lanes)

    def put(self, symbols: torch.Tensor, tables: Tables, index: torch.Tensor | None = None) -> None:
        """Append symbols. Arguments and errors as `encode`."""
        flat = _integers("symbols", symbols).flatten()
        rows = _rows(tables, index, len(flat))
        _check_precision("tables", tables.precision, self._precision)
        self._native.put(flat.numpy(), tables.native, _array(rows))

    def put_mixtures(self, symbols: torch.Tensor, mixtures: Mixtures) -> None:
        """Append symbols [..., C] with mixtures of their own. Errors as `encode_mixtures`."""
        flat, parts = _symbols_of(mixtures, symbols)
        _check_precision("mixtures", 16, self._precision)
        self._native.put_mixtures(flat.numpy(), *parts)

    def finish(self) -> bytes:
        """The stream."""
        stream: bytes = self._native.finish()
        return stream


class Decoder:
    """The symbols of one stream, bit by bit: as many at a time, with the same tables, as they were put in. On the CPU.

    Args:
        stream: of an `Encoder`.
        lanes, kind, precision: as there.

    Raises:
        DamagedStream: it is too short.
        ValueError: an option is out of range.
    """

    def __init__(self, stream: bytes, *, lanes: int = 2, kind: str = "rans64", precision: int = 16) -> None:
        _check_kind(kind)
        self._precision = precision
        with _damage():
            self._native = host().RansDecoder(stream, kind, precision, lanes)

    def get(self, tables: Tables, index: torch.Tensor | None = None) -> torch.Tensor:
        """The next symbols, int32 in the shape of `index`, or one for each row. Errors as `decode`."""
        count = len(tables.cdf) if index is None else index.numel()
        rows = _rows(tables, index, count)
        _check_precision("tables", tables.precision, self._precision)
        with _damage():
            symbols = torch.from_numpy(self._native.get(count, tables.native, _array(rows)))
        return symbols if index is None else symbols.view(index.shape)

    def get_mixtures(self, mixtures: Mixtures) -> torch.Tensor:
        """The next symbols, int32 [..., C], one for each mixture. Errors as `decode_mixtures`."""
        parts, shape = _mixtures(mixtures)
        _check_precision("mixtures", 16, self._precision)
        with _damage():
            return torch.from_numpy(self._native.get_mixtures(math.prod(shape), *_arrays(parts))).view(shape)

    def finish(self) -> None:
        """Make sure that this was all. Raises DamagedStream if something is left or a state is not at its end."""
        with _damage():
            self._native.finish()


def _check_precision(name: str, got: int, precision: int) -> None:
    if got != precision:
        raise ValueError(f"{name} must have the precision of the coder, {precision}, got {got}")


def _check_cuts(cu_seqlens: Any, count: int) -> list[int]:
    cu = [0, count] if cu_seqlens is None else [int(end) for end in cu_seqlens]
    if len(cu) < 1 or cu[0] != 0 or cu[-1] != count or sorted(cu) != cu:
        raise ValueError(f"cu_seqlens must rise from 0 to the {count} symbols, got {cu if len(cu) < 9 else '...'}")
    return cu


def _check_streams(streams: Sequence[bytes], cu: list[int]) -> None:
    if len(streams) != len(cu) - 1:
        raise ValueError(f"streams must be {len(cu) - 1}, as cu_seqlens says, got {len(streams)}")


def _check_format(kind: str, precision: int, lanes: int) -> None:
    host().RansEncoder(kind, precision, lanes)  # refuses what is out of range


def _check_threads(threads: int | None) -> int:
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    return threads or torch.get_num_threads()


def encode(
    symbols: torch.Tensor,
    tables: Tables,
    index: torch.Tensor | None = None,
    *,
    cu_seqlens: torch.Tensor | Sequence[int] | None = None,
    lanes: int = 2,
    kind: str = "rans64",
    threads: int | None = None,
) -> list[bytes]:
    """Symbols to streams of bytes.

    A stream takes the sum of -log2(probability) bits of its symbols within 0.1 %, and the states of its lanes, 8 bytes
    each (4 for the other kinds). Any symbol of 32 bits can be coded if the tables have an escape.

    Args:
        symbols: any shape, integers.
        tables: their probabilities.
        index: of the same shape, the row of each symbol; None if there is a row for each.
        cu_seqlens: [S + 1]: stream s holds the symbols from cu_seqlens[s] to cu_seqlens[s + 1]; None is one stream.
            Streams can be decoded one by one, and are coded on several threads.
        lanes: interleaved states of a stream, 1 to 1024; the decoder needs the same number.
        kind: "rans64" (states of 64 bits, words of 32), "rans_byte" (32 and 8; precision to 16) or "rans_word" (32 and
            16; precision 12 at best).
        threads: at most so many; None is PyTorch's number. The bytes do not depend on it.

    Returns:
        S streams.

    Raises:
        TypeError: symbols or index are no integers.
        ValueError: shapes do not fit, index names no row, a symbol is in no bin of tables without escape, or lanes,
            kind, threads or the tables' precision are out of range.

    Source: Duda, Asymmetric Numeral Systems, 2013; Giesen, Interleaved Entropy Coders, 2014.

    Example:
        >>> tables = vlkern.coding.gaussian_tables()
        >>> index = vlkern.coding.scale_index(torch.rand(2, 8) * 3)
        >>> symbols = torch.randint(-3, 3, (2, 8))
        >>> [stream] = vlkern.coding.encode(symbols, tables, index)
        >>> torch.equal(vlkern.coding.decode([stream], tables, index), symbols.int())
        True
    """
    _check_kind(kind)
    flat = _integers("symbols", symbols).flatten()
    rows, cu = _rows(tables, index, len(flat)), _check_cuts(cu_seqlens, len(flat))
    options = kind, tables.precision, lanes, _check_threads(threads)
    streams: list[bytes] = host().rans_encode(flat.numpy(), cu, tables.native, _array(rows), *options)
    return streams


def decode(
    streams: Sequence[bytes],
    tables: Tables,
    index: torch.Tensor | None = None,
    *,
    cu_seqlens: torch.Tensor | Sequence[int] | None = None,
    lanes: int = 2,
    kind: str = "rans64",
    threads: int | None = None,
) -> torch.Tensor:
    """Streams of `encode` to symbols. Arguments as there.

    A stream that is cut short or continued, or whose states do not end where they began, is refused. Most damage shows
    so, but not all of it: where a wrong symbol must never pass, keep a checksum of the bytes.

    Where `index` is on a GPU (or the tables, without index), CUDA decodes there: a warp a stream and a thread a lane,
    so streams of 32 lanes use it best. It waits for the GPU, to see whether the streams are whole.

    Returns:
        int32, of the shape of `index`, or [number of rows], on its device.

    Raises:
        DamagedStream: a ValueError: a stream is not what `encode` wrote with these tables.
        TypeError, ValueError: as `encode`.

    Example:
        >>> tables = vlkern.coding.tables_from_pmfs([[0.5, 0.5]], [0], escape=False)
        >>> vlkern.coding.decode([bytes(4)], tables, torch.zeros(3, dtype=torch.int32))
        Traceback (most recent call last):
        vlkern.coding.errors.DamagedStream: the stream is shorter than its states
    """
    _check_kind(kind)
    count = len(tables.cdf) if index is None else index.numel()
    device = tables.cdf.device if index is None else index.device
    on_gpu = gpu.decodes(device)
    rows, cu = _rows(tables, index, count, device if on_gpu else _CPU), _check_cuts(cu_seqlens, count)
    _check_streams(streams, cu)
    options = kind, tables.precision, lanes
    if on_gpu:
        _check_format(*options)
        symbols = gpu.decode_tables(streams, cu, tables, rows, KINDS.index(kind), lanes)
    else:
        native = *options, _check_threads(threads)
        with _damage():
            found = host().rans_decode(list(streams), cu, tables.native, _array(rows), *native)
        symbols = torch.from_numpy(found).to(device)
    return symbols if index is None else symbols.view(index.shape)


def encode_mixtures(
    symbols: torch.Tensor,
    mixtures: Mixtures,
    *,
    cu_seqlens: torch.Tensor | Sequence[int] | None = None,
    lanes: int = 2,
    kind: str = "rans64",
    threads: int | None = None,
) -> list[bytes]:
    """Symbols with mixtures of their own to streams of bytes.

    The probabilities are those of `vlkern.ops.mixture_cdf` at `vlkern.ops.mixture_window`: at 16 bits of precision, and
    the same on every machine. Only the entries that are needed are computed, and no row is built. Symbols outside of
    their window cost 8 to 40 bits more.

    Args:
        symbols: [..., C], integers.
        mixtures: [..., K, C], at most 16 components.
        cu_seqlens, lanes, kind, threads: as for `encode`; cu_seqlens counts single symbols.

    Returns:
        S streams.

    Raises:
        TypeError: symbols are no integers, or mixtures have another dtype than theirs.
        ValueError: shapes do not fit, a mean, scale or weight is out of range, or an option.

    Example:
        >>> params = torch.randn(8, 3, 2, 192)
        >>> mixtures, symbols = vlkern.coding.quantize_mixture(params), torch.randint(-2, 3, (8, 192))
        >>> [stream] = vlkern.coding.encode_mixtures(symbols, mixtures)
        >>> torch.equal(vlkern.coding.decode_mixtures([stream], mixtures), symbols.int())
        True
    """
    _check_kind(kind)
    flat, parts = _symbols_of(mixtures, symbols)
    cu = _check_cuts(cu_seqlens, len(flat))
    streams: list[bytes] = host().rans_encode_mixtures(flat.numpy(), cu, *parts, kind, lanes, _check_threads(threads))
    return streams


def decode_mixtures(
    streams: Sequence[bytes],
    mixtures: Mixtures,
    *,
    cu_seqlens: torch.Tensor | Sequence[int] | None = None,
    lanes: int = 2,
    kind: str = "rans64",
    threads: int | None = None,
) -> torch.Tensor:
    """Streams of `encode_mixtures` to symbols. Arguments as there; what `decode` says of damage and GPUs.

    Returns:
        int32 [..., C], on the device of the mixtures.

    Raises:
        DamagedStream: a ValueError: a stream is not what `encode_mixtures` wrote with these mixtures.
        TypeError, ValueError: as `encode_mixtures`.

    Example:
        >>> params = torch.zeros(3, 1, 4)  # logits, means, log scales
        >>> vlkern.coding.decode_mixtures([bytes(4)], vlkern.coding.quantize_mixture(params))
        Traceback (most recent call last):
        vlkern.coding.errors.DamagedStream: the stream is shorter than its states
    """
    _check_kind(kind)
    parts, shape = _mixtures(mixtures)
    cu = _check_cuts(cu_seqlens, math.prod(shape))
    _check_streams(streams, cu)
    device = parts[0].device
    if gpu.decodes(device):
        _check_format(kind, 16, lanes)
        return gpu.decode_mixtures(streams, cu, parts, KINDS.index(kind), lanes).view(shape)
    options = kind, lanes, _check_threads(threads)
    with _damage():
        found = host().rans_decode_mixtures(list(streams), cu, *_arrays(parts), *options)
    return torch.from_numpy(found).view(shape).to(device)

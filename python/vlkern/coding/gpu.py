"""rANS streams to symbols on a GPU: csrc/cuda/rans.cu decodes where the tables, rows or mixtures are."""

from collections.abc import Sequence

import torch

from vlkern import _checks
from vlkern.coding.errors import DamagedStream
from vlkern.coding.tables import Tables

_LIBRARY = torch.library.Library("vlkern", "FRAGMENT")
_LIBRARY.define(
    "rans_decode_tables(Tensor bytes, Tensor spans, Tensor cdf, Tensor size, Tensor offset, Tensor? index, bool escape,"
    " int kind, int precision, int lanes) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "rans_decode_mixtures(Tensor bytes, Tensor spans, Tensor means, Tensor scales, Tensor weights, int kind, int lanes)"
    " -> (Tensor, Tensor)"
)

_ALIGNED = 8
#: What a status says, from 1 on.
_DAMAGE = (
    "the stream is shorter than its states",
    "a state is out of range",
    "the stream ends too early",
    "an escaped symbol is too large",
    "an escaped symbol is one of its table",
    "the states do not end where they began",
    "bytes are left over",
)
_MISUSE = (
    "index must name rows of the tables",
    "tables must rise strictly along a row",
    "mixtures must have means of at most 2^23, scales from 0 to 63, and weights of at least 0 with a sum of 4096",
    "streams must lie within their bytes",
)


def decodes(device: torch.device) -> bool:
    """Whether there is a decoder for tensors on this device: CUDA's, if it was built."""
    return device.type == "cuda" and torch._C._dispatch_has_kernel_for_dispatch_key(
        "vlkern::rans_decode_tables", "CUDA"
    )


def pack(streams: Sequence[bytes], cu: Sequence[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Streams one after the other, each from a multiple of 8 on, and where they are.

    Args:
        streams: S of them.
        cu: [S + 1], their first symbols and the end of the last one.
        device: where to.

    Returns:
        bytes uint8, and spans int64 [S, 4]: a stream's begin in 8 bytes, its bytes, its first symbol and its end.
    """
    spans, begin = [], 0
    for stream, first, end in zip(streams, cu[:-1], cu[1:], strict=True):
        spans.append((begin, len(stream), first, end))
        begin += -(-len(stream) // _ALIGNED)
    room = bytearray(_ALIGNED * begin)
    for stream, (eighth, length, _, _) in zip(streams, spans, strict=True):
        room[_ALIGNED * eighth : _ALIGNED * eighth + length] = stream
    data = torch.frombuffer(room, dtype=torch.uint8) if room else torch.empty(0, dtype=torch.uint8)
    return data.to(device), torch.tensor(spans, dtype=torch.int64).view(-1, 4).to(device)


def judged(symbols: torch.Tensor, status: torch.Tensor) -> torch.Tensor:
    """The symbols, if every stream has status 0; waits for the device.

    Raises:
        DamagedStream: a stream is not what an encoder wrote.
        ValueError: the tables, rows or mixtures are none.
    """
    wrong = [code for code in status.tolist() if code]
    if not wrong:
        return symbols
    code = wrong[0] - 1
    if code < len(_DAMAGE):
        raise DamagedStream(_DAMAGE[code])
    raise ValueError(_MISUSE[code - len(_DAMAGE)])


def decode_tables(
    streams: Sequence[bytes], cu: Sequence[int], tables: Tables, index: torch.Tensor | None, kind: int, lanes: int
) -> torch.Tensor:
    """Symbols with rows of tables, int32.

    Args:
        streams, cu: see `pack`.
        tables: on any device.
        index: int32, the row of each symbol, where to decode; None is a row for each, and where the tables are.
        kind: its number.
        lanes: of a stream.

    Raises:
        DamagedStream, ValueError: see `judged`.
    """
    device = tables.cdf.device if index is None else index.device
    options = tables.escape, kind, tables.precision, lanes
    packed = pack(streams, cu, device)
    return judged(*torch.ops.vlkern.rans_decode_tables(*packed, *tables.on(device), index, *options))


def decode_mixtures(
    streams: Sequence[bytes], cu: Sequence[int], mixtures: Sequence[torch.Tensor], kind: int, lanes: int
) -> torch.Tensor:
    """Symbols with mixtures [rows, K, C] of their own, int32, where these are. Otherwise as `decode_tables`."""
    means = mixtures[0]
    for name, part in zip(("scales", "weights"), mixtures[1:], strict=True):
        _checks.on_device(name, part, "means", means)
    packed = pack(streams, cu, means.device)
    return judged(*torch.ops.vlkern.rans_decode_mixtures(*packed, *mixtures, kind, lanes))

"""`python -m vlkern.bench.coder`: entropy coding beside the coders that codecs of PyTorch use.

294,912 symbols, what a picture of 384 x 1024 has at 192 channels: with one of 64 Gaussian tables each, or with a
mixture of three Gaussians each. From tensors to bytes and back; everything that a coder wants in another form (lists,
float64, rows of probabilities) is converted in its time, but for the rows that torchac and constriction need of
mixtures, which are made before. Ours are four streams, on one thread and on two. The first call of each contestant
gives the symbols that it decodes, which are compared; every other is timed. Results are written and shown like those
of an op, and in nanoseconds a symbol.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from vlkern import coding, ops
from vlkern.bench import machine
from vlkern.bench.models import Call, Event, add_arguments, run
from vlkern.bench.rivals import Absent
from vlkern.coding import Mixtures

NAME = "coder"
ROWS, CHANNELS, COMPONENTS = 1536, 192, 3
COUNT = ROWS * CHANNELS
_CUTS = [COUNT * i // 4 for i in range(5)]
_REACH = 16  # of the rows of mixtures that rivals get

Encode = Callable[[], Any]
Decode = Callable[[Any], torch.Tensor]


def gaussians() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Symbols and scales [1536, 192] and rows of `gaussian_tables`: most channels narrow, some wide."""
    g = torch.Generator().manual_seed(0)
    scales = (0.8 * torch.randn(CHANNELS, generator=g) - 1).exp() * (
        0.5 * torch.randn(ROWS, CHANNELS, generator=g)
    ).exp()
    index = coding.scale_index(scales)
    scales = torch.tensor(coding.SCALES)[index.long()]
    return (torch.randn(scales.shape, generator=g) * scales).round().int(), scales, index


def mixtures() -> tuple[torch.Tensor, Mixtures]:
    """Symbols [1536, 192] and their mixtures: scales as above, most means near 0; about 0.4 bits a symbol."""
    g = torch.Generator().manual_seed(0)
    shape = (ROWS, COMPONENTS, CHANNELS)
    scales = 0.8 * torch.randn(CHANNELS, generator=g) - 1.9 + 0.5 * torch.randn(shape, generator=g)
    far = torch.rand(shape, generator=g) > 0.8
    means = torch.randn(shape, generator=g) * torch.where(far, scales.exp(), 0.05)
    logits = 1.5 * torch.randn(shape, generator=g)
    found = coding.quantize_mixture(torch.stack([logits, means, scales], 1))
    chosen = torch.multinomial(found.weights.movedim(1, 2).flatten(0, 1).float(), 1, generator=g).view(
        ROWS, 1, CHANNELS
    )
    mean, scale = (part.gather(1, chosen)[:, 0] for part in (found.means, found.scales.long()))
    noise = torch.randn(mean.shape, generator=g) * torch.tensor(coding.SCALES)[scale]
    return (mean / 256 + noise).round().clamp(-_REACH, _REACH).int(), found


def _installed(name: str) -> ModuleType:
    if importlib.util.find_spec(name) is None:
        raise Absent(f"{name} is not installed")
    return importlib.import_module(name)


def compressai_ans() -> ModuleType:
    """compressai.ans alone: the package imports what its coder does not need."""
    found = importlib.util.find_spec("compressai")
    if found is None or found.origin is None:
        raise Absent("compressai is not installed")
    [path] = Path(found.origin).parent.glob("ans.*.so")
    spec = importlib.util.spec_from_file_location("compressai.ans", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _ours_tables(threads: int) -> tuple[Encode, Decode]:
    symbols, _, index = gaussians()
    tables = coding.gaussian_tables()
    options: dict[str, Any] = {"cu_seqlens": _CUTS, "threads": threads}
    return (
        partial(coding.encode, symbols, tables, index, **options),
        lambda streams: coding.decode(streams, tables, index, **options),
    )


def _compressai() -> tuple[Encode, Decode]:
    ans, tables = compressai_ans(), coding.gaussian_tables()
    symbols, _, index = gaussians()
    # The tables are the model's and wait as lists.
    rows = [row[:size] for row, size in zip(tables.cdf.tolist(), tables.size.tolist(), strict=True)]
    rest = rows, tables.size.tolist(), tables.offset.tolist()
    encoder, decoder = ans.RansEncoder(), ans.RansDecoder()
    return (
        lambda: encoder.encode_with_indexes(symbols.flatten().tolist(), index.flatten().tolist(), *rest),
        lambda stream: torch.tensor(
            decoder.decode_with_indexes(stream, index.flatten().tolist(), *rest), dtype=torch.int32
        ).view(index.shape),
    )


def _constriction() -> tuple[Encode, Decode]:
    stack = _installed("constriction").stream.stack
    family = _installed("constriction").stream.model.QuantizedGaussian(-2048, 2047)
    symbols, scales, _ = gaussians()

    def parameters() -> tuple[Any, Any]:
        return np.zeros(COUNT), scales.flatten().double().numpy()

    def encode() -> Any:
        coder = stack.AnsCoder()
        coder.encode_reverse(symbols.flatten().numpy(), family, *parameters())
        return coder.get_compressed()

    def decode(words: Any) -> torch.Tensor:
        return torch.from_numpy(stack.AnsCoder(words).decode(family, *parameters())).view(symbols.shape)

    return encode, decode


def _torchac() -> tuple[Encode, Decode]:
    torchac = _installed("torchac")
    tables = coding.gaussian_tables(coding.SCALES[:40])
    symbols, _, index = gaussians()
    low, high = int(tables.offset.min()), int(-tables.offset.min())
    # One table of equal rows; row 40 and on, of scales that do not occur, would make it ten times as wide.
    cdf = torch.full((40, high - low + 2), 65536, dtype=torch.int32)
    for row, (size, offset) in enumerate(zip(tables.size.tolist(), tables.offset.tolist(), strict=True)):
        cdf[row, : offset - low] = 0
        cdf[row, offset - low : offset - low + size] = tables.cdf[row, :size]
    wide = (cdf.long() * (65536 - cdf.shape[1]) // 65536 + torch.arange(cdf.shape[1])).int()
    wide[:, -1] = 65536
    rows = torch.where(wide >= 32768, wide - 65536, wide).short()
    return (
        lambda: torchac.encode_int16_normalized_cdf(rows[index.long()], (symbols - low).short()),
        lambda stream: torchac.decode_int16_normalized_cdf(rows[index.long()], stream).int() + low,
    )


def _ours_mixtures(threads: int) -> tuple[Encode, Decode]:
    symbols, found = mixtures()
    options: dict[str, Any] = {"cu_seqlens": _CUTS, "threads": threads}
    return (
        partial(coding.encode_mixtures, symbols, found, **options),
        lambda streams: coding.decode_mixtures(streams, found, **options),
    )


def _rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Symbols from 0 on, and rows [COUNT, 2 reach + 2] of their mixtures."""
    symbols, found = mixtures()
    low = torch.full_like(symbols, -_REACH)
    return symbols.flatten() + _REACH, ops.mixture_cdf(*found, low, 2 * _REACH + 1).flatten(0, -2)


def _constriction_rows() -> tuple[Encode, Decode]:
    stack = _installed("constriction").stream.stack
    family = _installed("constriction").stream.model.Categorical(perfect=False)
    symbols, cdf = _rows()
    p = cdf.diff(dim=1).double().numpy() / 65536

    def encode() -> Any:
        coder = stack.AnsCoder()
        coder.encode_reverse(symbols.numpy(), family, p)
        return coder.get_compressed()

    return encode, lambda words: torch.from_numpy(stack.AnsCoder(words).decode(family, p)) - _REACH


def _torchac_rows() -> tuple[Encode, Decode]:
    torchac = _installed("torchac")
    symbols, cdf = _rows()
    rows = torch.where(cdf >= 32768, cdf - 65536, cdf).short()
    return (
        lambda: torchac.encode_int16_normalized_cdf(rows, symbols.short()),
        lambda stream: torchac.decode_int16_normalized_cdf(rows, stream).int() - _REACH,
    )


CONTESTANTS: dict[str, dict[str, Callable[[], tuple[Encode, Decode]]]] = {
    "tables": {
        "vlkern 1 thread": partial(_ours_tables, 1), "vlkern 2 threads": partial(_ours_tables, 2),
        "compressai": _compressai, "constriction": _constriction, "torchac": _torchac,
    },
    "mixtures": {
        "vlkern 1 thread": partial(_ours_mixtures, 1), "vlkern 2 threads": partial(_ours_mixtures, 2),
        "constriction": _constriction_rows, "torchac": _torchac_rows,
    },
}  # fmt: skip
#: Bytes of a symbol and of what a coder reads for it.
BYTES = {"tables": 8, "mixtures": 4 + 7 * COMPONENTS}


def _call(make: Callable[[], tuple[Encode, Decode]], direction: str) -> Call:
    encode, decode = make()
    coded = encode()
    first = [True]

    def call() -> torch.Tensor:
        if first:
            first.clear()
            return decode(coded).flatten()
        done: torch.Tensor = encode() if direction == "encode" else decode(coded)
        return done

    return call


def event(case: str, direction: str) -> Event:
    """Encoding or decoding of all symbols."""

    def enter(_: torch.dtype) -> dict[str, Callable[[], Call]]:
        return {name: partial(_call, make, direction) for name, make in CONTESTANTS[case].items()}

    def truth() -> torch.Tensor:
        symbols: torch.Tensor = gaussians()[0] if case == "tables" else mixtures()[0]
        return symbols.flatten().double()

    return Event(f"{case}, {direction}", [COUNT], "forward", lambda _: float(BYTES[case] * COUNT), enter, truth)


def main(argv: list[str] | None = None) -> int:
    """Runs the races, prints them and writes <out>/<hardware>/coder.json with its plots."""
    parser = argparse.ArgumentParser(prog="python -m vlkern.bench.coder", description=__doc__)
    add_arguments(parser)
    args = parser.parse_args(argv)
    args.dtypes = ["fp32"]  # there is nothing to choose
    events = [partial(event, case, direction) for case in CONTESTANTS for direction in ("encode", "decode")]
    status = run(NAME, parser, args, (), events, "read")
    slug = machine.hardware("cpu")["slug"] + ("" if args.malloc == "recycle" else "-default-malloc")
    for row in json.loads((args.out / slug / f"{NAME}.json").read_text())["rows"]:
        if row["status"] == "ok":
            print(f"{row['sample']:18} {row['contestant']:18} {1e6 * row['ms']['median'] / COUNT:7.1f} ns a symbol")
    return status


if __name__ == "__main__":
    sys.exit(main())

"""Interleaved rANS: published streams, any symbol, any number of streams and threads, damage."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from vlkern import coding
from vlkern.coding import DamagedStream, Tables, decode, encode, gaussian_tables, tables_from_pmfs

QUARTERS = [0, 32768, 49152, 57344, 65536]
SYMBOLS = [0, 1, 2, 3, 0, 0, 1, 0, 2, 0, 0, 3, 1, 0, 0, 0]
#: Streams of Giesen's coders: kind, precision, lanes, cumulative frequencies, symbols, bytes.
KNOWN = [
    ("rans64", 16, 1, QUARTERS, SYMBOLS, "00003fec24000004"),
    ("rans_byte", 14, 1, QUARTERS, SYMBOLS, "79c40104d02000"),
    ("rans_word", 12, 1, QUARTERS, SYMBOLS, "12f043080074"),
    ("rans_word", 12, 2, QUARTERS, SYMBOLS, "0014474000fa0820"),
    ("rans_word", 12, 4, QUARTERS, SYMBOLS, "0024810000082000004c800000be0001"),
    ("rans64", 16, 1, [0, 1, 65535, 65536], [1, 0, 2, 1, 1, 2, 0, 0, 1, 1], "17000b00068000002d000f0000000800"),
]


def ints(values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(("kind", "precision", "lanes", "cdf", "symbols", "stream"), KNOWN)
def test_published_streams(kind, precision, lanes, cdf, symbols, stream):
    row = ints([cdf]) >> (16 - precision)
    tables = Tables(row, ints([len(cdf)]), ints([0]), escape=False, precision=precision)
    index, options = torch.zeros(len(symbols), dtype=torch.int32), {"lanes": lanes, "kind": kind}
    assert encode(ints(symbols), tables, index, **options) == [bytes.fromhex(stream)]
    assert decode([bytes.fromhex(stream)], tables, index, **options).tolist() == symbols


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_symbol_comes_back(data):
    """Random tables with rare and sure bins, symbols in and far outside them, any lanes, kinds and streams."""
    kind, precision = data.draw(st.sampled_from([("rans64", 16), ("rans64", 24), ("rans_byte", 14), ("rans_word", 12)]))
    weight = st.sampled_from([0.0, 1e-9, 1e-3, 1.0, 1000.0])
    pmfs = data.draw(st.lists(st.lists(weight, min_size=2, max_size=9).filter(any), min_size=1, max_size=5))
    offset = ints(data.draw(st.lists(st.integers(-9, 9), min_size=len(pmfs), max_size=len(pmfs))))
    tables = tables_from_pmfs(pmfs, offset, precision=precision)
    symbol = st.one_of(st.integers(-12, 12), st.sampled_from([-(2**31), 2**31 - 1, 128, -129]))
    pairs = data.draw(st.lists(st.tuples(symbol, st.integers(0, len(pmfs) - 1)), max_size=40))
    symbols, index = ints([s for s, _ in pairs]), ints([i for _, i in pairs])
    cut = data.draw(st.integers(0, len(pairs)))
    options = {
        "lanes": data.draw(st.sampled_from([1, 2, 3, 8])), "kind": kind, "cu_seqlens": [0, cut, cut, len(pairs)],
    }  # fmt: skip
    streams = encode(symbols, tables, index, threads=1, **options)
    assert streams == encode(symbols, tables, index, threads=3, **options)
    assert torch.equal(decode(streams, tables, index, threads=2, **options), symbols)


def _draw(count):
    """Symbols of Gaussians of many scales, and their rows."""
    g = torch.Generator().manual_seed(0)
    index = torch.randint(0, 48, (count,), generator=g, dtype=torch.int32)
    scale = torch.tensor(coding.SCALES)[index.long()]
    return (torch.randn(count, generator=g) * scale).round().int(), index


def test_the_length_is_that_of_the_entropy():
    symbols, index = _draw(100_000)
    tables = gaussian_tables()
    bins = (symbols - tables.offset[index.long()]).long()
    assert bool((bins >= 0).all())
    width = tables.cdf[index.long(), bins + 1] - tables.cdf[index.long(), bins]
    bits = -(width.double() / 65536).log2().sum().item()
    for lanes in (1, 4):
        [stream] = encode(symbols, tables, index, lanes=lanes)
        assert 8 * len(stream) <= 1.001 * bits + 64 * lanes + 32


def test_a_row_for_each_symbol_and_shapes():
    pmfs = torch.rand(24, 7, generator=torch.Generator().manual_seed(1))
    tables = tables_from_pmfs(pmfs, torch.arange(24))
    symbols = torch.arange(24) + torch.arange(24) % 6
    assert torch.equal(decode(encode(symbols, tables), tables), symbols.int())
    index = torch.arange(24).view(2, 3, 4)
    again = decode(encode(symbols.view(2, 3, 4), tables, index), tables, index)
    assert torch.equal(again, symbols.view(2, 3, 4).int())


def test_damage_is_told_or_harmless():
    """Cut, continued and changed streams: an error or other symbols, and never anything else."""
    symbols, index = _draw(500)
    tables = gaussian_tables()
    [stream] = encode(symbols, tables, index)
    for end in range(0, len(stream), 7):
        with pytest.raises(DamagedStream):
            decode([stream[:end]], tables, index)
    with pytest.raises(DamagedStream, match="left over"):
        decode([stream + b"\0"], tables, index)
    told, bits = 0, range(0, 8 * len(stream), 11)
    for bit in bits:
        changed = bytearray(stream)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            assert not torch.equal(decode([bytes(changed)], tables, index), symbols)
        except DamagedStream:
            told += 1
    assert told > 0.9 * len(bits)


def test_damaged_escapes_are_told():
    """A value that is cut off, too long, or one that needs no escape."""
    tables, index = gaussian_tables(), torch.zeros(2, dtype=torch.int32)
    [stream] = encode(ints([10_000, 0]), tables, index)
    assert stream[-3:] == bytes([0x01, 0x9C, 0xA0])  # 20000, seven bits a byte, read from the end
    for tail, message in [(b"\xff" * 5, "too large"), (b"\0", "is one of its table"), (b"\0" + b"\x80" * 4, "one of")]:
        with pytest.raises(DamagedStream, match=message):
            decode([stream[:-3] + tail], tables, index)


def test_a_stream_in_parts_is_the_stream_of_all():
    """Symbols, some of them escaped, that are put in and taken out in other portions; lanes go on where they were."""
    symbols, index = _draw(101)
    symbols[::20] = -(2**31)
    tables = gaussian_tables()
    encoder = coding.Encoder(lanes=3)
    for part, rows in zip(symbols.split([50, 1, 50]), index.split([50, 1, 50]), strict=True):
        encoder.put(part, tables, rows)
    stream = encoder.finish()
    assert [stream] == encode(symbols, tables, index, lanes=3)
    decoder = coding.Decoder(stream, lanes=3)
    parts = [decoder.get(tables, rows) for rows in index.split([20, 31, 50])]
    decoder.finish()
    assert torch.equal(torch.cat(parts), symbols)
    early = coding.Decoder(stream, lanes=3)
    early.get(tables, index[:20])
    with pytest.raises(DamagedStream, match="do not end"):
        early.finish()
    with pytest.raises(DamagedStream, match="shorter"):
        coding.Decoder(stream[:20], lanes=3)
    with pytest.raises(ValueError, match="precision of the coder, 16, got 20"):
        early.get(tables_from_pmfs([[1, 1]], [0], precision=20))


def test_gaussian_tables_are_the_probabilities():
    tables = gaussian_tables()
    for row in (0, 20, 35):
        s, size = coding.SCALES[row], int(tables.size[row])
        share = tables.cdf[row, :size].diff().double() / 65536
        k = torch.arange(size - 2) + int(tables.offset[row])
        exact = [0.5 * (math.erf((v + 0.5) / s / 2**0.5) - math.erf((v - 0.5) / s / 2**0.5)) for v in k.tolist()]
        # Coding with rounded probabilities costs next to nothing. (A bin of almost nothing still gets 1 / 65536.)
        p = torch.tensor(exact, dtype=torch.float64)
        assert (p * (p / share[:-1]).log2()).sum() < 1e-3
    edges = torch.tensor([0.11, coding.SCALES[5], 0.2, 1e-9, 1e9], dtype=torch.float64)
    assert coding.scale_index(edges).tolist() == [0, 5, 5, 0, 63]


def test_bad_arguments_are_told():
    tables, index = tables_from_pmfs([[0.5, 0.5]], [0], escape=False), torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ValueError, match="symbols must be in their tables"):
        encode(torch.tensor([0, 1, 2]), tables, index)
    with pytest.raises(TypeError, match="symbols must be integers"):
        encode(torch.zeros(3), tables, index)
    with pytest.raises(ValueError, match="symbols must fit in 32 bits"):
        encode(torch.tensor([0, 1, 2**31]), tables, index)
    with pytest.raises(ValueError, match="index must name rows from 0 to 0"):
        encode(torch.zeros(3, dtype=torch.int32), tables, index + 1)
    with pytest.raises(ValueError, match="index must have an entry for each of the 2"):
        encode(torch.zeros(2, dtype=torch.int32), tables, index)
    with pytest.raises(ValueError, match="index must be given"):
        encode(torch.zeros(2, dtype=torch.int32), tables)
    with pytest.raises(ValueError, match="cu_seqlens must rise"):
        encode(index, tables, index, cu_seqlens=[0, 2])
    with pytest.raises(ValueError, match="lanes must be"):
        encode(index, tables, index, lanes=0)
    with pytest.raises(ValueError, match="kind must be"):
        encode(index, tables, index, kind="tans")
    with pytest.raises(ValueError, match="precision must be from 1 to 16"):
        encode(index, tables_from_pmfs([[1, 1]], [0], escape=False, precision=20), index, kind="rans_word")
    with pytest.raises(ValueError, match="streams must be 1"):
        decode([], tables, index)
    with pytest.raises(ValueError, match="cdf must have rows that rise strictly"):
        Tables(ints([[0, 7, 7, 65536]]), ints([4]), ints([0]))
    with pytest.raises(ValueError, match="size must be from 3"):
        Tables(ints([[0, 65536]]), ints([2]), ints([0]))
    with pytest.raises(ValueError, match="pmfs must be rows of probabilities"):
        tables_from_pmfs([[0.5, -0.5]], [0])

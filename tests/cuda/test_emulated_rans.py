"""The GPU's decoder of rANS streams on an emulated GPU (emulator/): the host's symbols, and its verdict on damage."""

import pytest
import torch
from rooms import ROOT

from vlkern import coding
from vlkern.coding import DamagedStream, Mixtures, Tables, gpu, rans
from vlkern.kernels.mixture_cdf import samples

EXTREMES = torch.tensor([-(2**31), 2**31 - 1, -32769, 600, -600, 127, 1, 0], dtype=torch.int32)
FORMATS = [("rans64", 16), ("rans64", 30), ("rans_byte", 16), ("rans_byte", 9), ("rans_word", 12), ("rans_word", 16)]


@pytest.fixture(scope="module", autouse=True)
def emulated(emulator):
    """Compiles the decoder for the emulated GPU, which takes CPU tensors, and lets `vlkern.coding` use it for them."""
    emulator.load(ROOT / "csrc/cuda/rans.cu", "rans", ROOT / "csrc/cuda")


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(gpu, "decodes", lambda device: True)


def random_tables(g, rows, precision, escape=True):
    """Rows of 2 to 40 bins with any widths, and something else behind their ends."""
    size = torch.randint(3, 42, (rows,), generator=g, dtype=torch.int32)
    cdf = torch.randint(-(2**31), 2**31 - 1, (rows, 42), generator=g, dtype=torch.int64).int()
    for row, n in zip(cdf, size.tolist(), strict=True):
        inner = torch.randperm(2 ** min(precision, 20) - 1, generator=g)[: n - 2].sort().values + 1
        row[:n] = torch.cat([torch.tensor([0]), inner, torch.tensor([2**precision])]).int()
    return Tables(cdf, size, torch.randint(-20, 5, (rows,), generator=g, dtype=torch.int32), escape, precision)


def symbols_of(g, tables, index):
    """Every bin is as likely; with escapes, some symbols lie outside."""
    bins = tables.size[index.long()] - 1 - int(tables.escape)
    symbols = tables.offset[index.long()] + (torch.rand(index.shape, generator=g) * bins).int()
    if tables.escape:
        symbols[3::11] = EXTREMES[torch.arange(len(symbols[3::11])) % len(EXTREMES)]
    return symbols


@pytest.mark.parametrize("turn", [0, 1, 4])
@pytest.mark.parametrize(("number", "lanes"), list(enumerate([1, 3, 31, 32, 33, 100])))
def test_tables(on_gpu, number, lanes, turn):
    """Streams of no symbols, of fewer than there are lanes, and of several rounds; three formats each."""
    kind, precision = FORMATS[(number + turn) % len(FORMATS)]
    g = torch.Generator().manual_seed(lanes)
    tables = random_tables(g, 7, precision, escape=lanes != 31)
    index = torch.randint(0, 7, (260,), generator=g, dtype=torch.int32)
    symbols = symbols_of(g, tables, index)
    options = {"cu_seqlens": [0, 0, 1, 31, 64, 260], "lanes": lanes, "kind": kind}
    streams = coding.encode(symbols, tables, index, **options)
    assert torch.equal(coding.decode(streams, tables, index.view(20, 13), **options), symbols.view(20, 13))


def test_a_row_for_each_symbol(on_gpu):
    g = torch.Generator().manual_seed(0)
    tables = random_tables(g, 150, 16)
    symbols = symbols_of(g, tables, torch.arange(150))
    assert torch.equal(coding.decode(coding.encode(symbols, tables, lanes=32), tables, lanes=32), symbols)
    assert coding.decode([], tables, torch.zeros(0, dtype=torch.int32), cu_seqlens=[0]).shape == (0,)


@pytest.mark.parametrize("lanes", [1, 32, 40])
@pytest.mark.parametrize("shape", [(90, 3, 5), (8, 1, 40), (33, 16, 2)], ids=str)
def test_mixtures(on_gpu, shape, lanes):
    """Symbols in the middle of their windows, at the ends, and outside."""
    mixtures = Mixtures(*samples.draw(shape, seed=lanes))
    g = torch.Generator().manual_seed(lanes)
    away = torch.randint(-(2**10), 2**10, mixtures.means[:, 0].shape, generator=g)
    symbols = mixtures.means[:, 0] // 256 + (away >> torch.randint(0, 11, away.shape, generator=g)).int()
    symbols.view(-1)[5::29] = EXTREMES[torch.arange(len(symbols.view(-1)[5::29])) % len(EXTREMES)]
    count = symbols.numel()
    for kind in rans.KINDS:
        options = {"cu_seqlens": [0, count // 3, count // 3 + 1, count], "lanes": lanes, "kind": kind}
        streams = coding.encode_mixtures(symbols, mixtures, **options)
        assert torch.equal(coding.decode_mixtures(streams, mixtures, **options), symbols)


def damaged(stream, g):
    """Cut, continued and changed."""
    found = [stream[:end] for end in range(0, len(stream), 17)] + [stream + b"\0", stream + b"\xff" * 9]
    for bit in torch.randint(0, 8 * len(stream), (80,), generator=g).tolist():
        changed = bytearray(stream)
        changed[bit // 8] ^= 1 << bit % 8
        found.append(bytes(changed))
    return found


@pytest.mark.parametrize(("kind", "lanes"), [("rans64", 3), ("rans64", 32), ("rans_byte", 2), ("rans_word", 40)])
def test_damage_is_what_the_host_says(kind, lanes):
    """All copies of a stream at once: the host's symbols, or an error where it has one."""
    g = torch.Generator().manual_seed(lanes)
    tables = random_tables(g, 9, 16)
    index = torch.randint(0, 9, (120,), generator=g, dtype=torch.int32)
    symbols = symbols_of(g, tables, index)
    [stream] = coding.encode(symbols, tables, index, lanes=lanes, kind=kind)
    copies = [stream, *damaged(stream, g)]
    packed = gpu.pack(copies, range(0, 120 * len(copies) + 1, 120), torch.device("cpu"))
    options = True, rans.KINDS.index(kind), 16, lanes
    found, status = torch.ops.vlkern.rans_decode_tables(
        *packed, *tables.on(index.device), index.repeat(len(copies)), *options
    )
    assert status[0] == 0 and torch.equal(found[:120], symbols)
    for copy, ours, code in zip(copies, found.split(120), status.tolist(), strict=True):
        try:
            wanted = coding.decode([copy], tables, index, lanes=lanes, kind=kind)
        except DamagedStream:
            assert 1 <= code <= 7
        else:
            assert code == 0 and torch.equal(ours, wanted)
    assert len(status.unique()) > 4


def test_words_that_say_what_is_wrong(on_gpu):
    tables, index = coding.gaussian_tables(), torch.zeros(2, dtype=torch.int32)
    [stream] = coding.encode(torch.tensor([10_000, 0]), tables, index)
    for tail, message in [(b"\xff" * 5, "too large"), (b"\0", "is one of its table"), (b"\x80", "too early")]:
        with pytest.raises(DamagedStream, match=message):
            coding.decode([stream[:-3] + tail], tables, index)
    [plain] = coding.encode(index, tables, index)
    with pytest.raises(DamagedStream, match="left over"):
        coding.decode([plain + bytes(1)], tables, index)
    with pytest.raises(DamagedStream, match="shorter than its states"):
        coding.decode([stream[:15]], tables, index)
    with pytest.raises(DamagedStream, match="a state is out of range"):
        coding.decode([b"\xff" * len(stream)], tables, index)
    with pytest.raises(ValueError, match="lanes must be from 1 to 1024"):
        coding.decode([stream], tables, index, lanes=1025)


def test_what_lies_on_the_device_is_not_trusted(on_gpu):
    """Values that Python has not looked at, or that have changed since."""
    index = torch.zeros(5, dtype=torch.int32)
    tables = coding.tables_from_pmfs([[1, 2, 3, 4]], [0])
    streams = coding.encode(index + 2, tables, index)
    for wrong in (-1, 1, 2**31 - 1):
        with pytest.raises(ValueError, match="index must name rows"):
            coding.decode(streams, tables, index + wrong)
    for part, value in (("size", -5), ("size", 1), ("size", 6), ("cdf", -(2**31)), ("cdf", 2**31 - 1)):
        spoilt = coding.tables_from_pmfs([[1, 2, 3, 4]], [0])
        getattr(spoilt, part).fill_(value)
        with pytest.raises(ValueError, match="tables must rise strictly"):
            coding.decode(streams, spoilt, index)
    mixtures = samples.draw((4, 2, 3), seed=0)
    streams = coding.encode_mixtures(torch.zeros(4, 3, dtype=torch.int32), Mixtures(*mixtures))
    for part, value in ((0, 2**23 + 1), (0, -(2**31)), (1, 64), (2, -1), (2, 4097)):
        spoilt = [given.clone() for given in mixtures]
        spoilt[part][3, 1, 2] = value
        with pytest.raises(ValueError, match="mixtures must have means of at most"):
            coding.decode_mixtures(streams, Mixtures(*spoilt))
    bytes_, spans = gpu.pack([bytes(16)], [0, 1], index.device)
    for at, value in ((0, -1), (0, 1), (0, 2**62), (1, -1), (1, 17), (2, -1), (3, 6), (3, -1)):
        wrong = spans.clone()
        wrong[0, at] = value
        _, status = torch.ops.vlkern.rans_decode_tables(bytes_, wrong, *tables.on(index.device), index, True, 0, 16, 2)
        assert status.tolist() == [11]


def test_launches_check_what_they_are_given():
    packed = gpu.pack([bytes(16)], [0, 1], torch.device("cpu"))
    tables, index = coding.tables_from_pmfs([[1, 2]], [0]).on(torch.device("cpu")), torch.zeros(1, dtype=torch.int32)
    for arguments, message in (
        ((*packed, *tables, index.long(), True, 0, 16, 2), "int32 without gaps"),
        ((*packed, *tables, index, True, 0, 16, 1025), "kind or lanes"),
        ((*packed, *tables, index, True, 1, 17, 2), "precision out of range"),
        ((packed[0][1:9], packed[1], *tables, index, True, 0, 16, 2), "a multiple of 8"),
        ((packed[0], packed[1][:, :3], *tables, index, True, 0, 16, 2), r"int64 \[S, 4\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.vlkern.rans_decode_tables(*arguments)

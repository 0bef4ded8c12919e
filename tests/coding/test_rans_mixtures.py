"""Symbols with mixtures: the rows of `mixture_cdf` without the rows, any symbol and any mixture, damage, bad input."""

import hypothesis.strategies as st
import millions
import pytest
import torch
from hypothesis import given, settings

import vlkern
from vlkern import coding
from vlkern.coding import DamagedStream, Mixtures, Tables, decode_mixtures, encode_mixtures

EXTREMES = [-(2**31), 2**31 - 1, -32769, 32768, 600, -600, 1, 0]


def draw(rows, channels, components=3, *, seed=0, wild=False):
    """Symbols [rows, channels] and their mixtures: narrow ones around 0, or anything that there may be."""
    g = torch.Generator().manual_seed(seed)
    shape = (rows, components, channels)
    shares = torch.rand(shape, generator=g).pow(4 if wild else 1)
    weights = (shares / shares.sum(1, keepdim=True) * 4096).int()
    weights[:, 0] += 4096 - weights.sum(1)
    if wild:
        bits = torch.randint(0, 24, shape, generator=g)
        means = (torch.randint(-(2**23), 2**23 + 1, shape, generator=g) >> bits).int()
        scales = torch.randint(0, 64, shape, generator=g)
    else:
        means = (torch.randn(shape, generator=g) * 40).int()
        scales = (torch.randn(shape, generator=g) * 6 + 14).clamp(0, 40)
    chosen = torch.randint(0, components, (rows, 1, channels), generator=g)
    mean, scale = (part.gather(1, chosen)[:, 0] for part in (means, scales.long()))
    symbols = (torch.randn(mean.shape, generator=g) * torch.tensor(coding.SCALES)[scale] + mean / 256).round().int()
    return symbols, Mixtures(means, scales.byte(), weights.short())


def tables_of(mixtures):
    """The rows that are never built, all of them as wide as the widest."""
    flat = Mixtures(*(part.movedim(-1, -2).flatten(0, -2)[..., None] for part in mixtures))
    low, half = vlkern.ops.mixture_window(*flat)
    width = 2 * int(half.max()) + 2
    cdf = torch.zeros(len(low), width, dtype=torch.int32)
    for n in half.unique().tolist():
        rows = (half == n)[:, 0]
        part = Mixtures(*(p[rows] for p in flat))
        cdf[rows, : 2 * n + 2] = vlkern.ops.mixture_cdf(*part, low[rows], 2 * n)[:, 0]
    return Tables(cdf, (2 * half[:, 0] + 2).int(), low[:, 0])


@pytest.mark.parametrize(
    ("rows", "channels", "components", "wild"),
    [(9, 192, 3, False), (300, 5, 3, True), (70, 4, 1, True), (33, 1, 16, True), (2, 131, 2, True)],
)
def test_the_bytes_are_those_of_the_rows(rows, channels, components, wild):
    """Every entry that is looked at, at block ends, in rows of any width and for symbols that escape."""
    symbols, mixtures = draw(rows, channels, components, wild=wild)
    symbols.view(-1)[::29] = torch.tensor(EXTREMES * (symbols.numel() // 200 + 1))[: len(symbols.view(-1)[::29])]
    tables = tables_of(mixtures)
    streams = encode_mixtures(symbols, mixtures)
    assert streams == coding.encode(symbols.flatten(), tables)
    assert torch.equal(decode_mixtures(streams, mixtures), symbols)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_every_symbol_comes_back(data):
    channels, components = data.draw(st.sampled_from([1, 2, 3, 4, 7, 130])), data.draw(st.integers(1, 5))
    rows = data.draw(st.integers(0, 6))
    symbols, mixtures = draw(rows, channels, components, seed=data.draw(st.integers(0, 99)), wild=True)
    if symbols.numel():
        near = mixtures.means[:, 0] // 256 + data.draw(st.integers(-1100, 1100))
        symbols = data.draw(
            st.sampled_from([symbols, near, symbols.clone().fill_(data.draw(st.sampled_from(EXTREMES)))])
        )
    cut = data.draw(st.integers(0, symbols.numel()))
    options = {
        "lanes": data.draw(st.sampled_from([1, 2, 5])), "kind": data.draw(st.sampled_from(coding.rans.KINDS)),
        "cu_seqlens": [0, cut, cut, symbols.numel()],
    }  # fmt: skip
    streams = encode_mixtures(symbols, mixtures, threads=1, **options)
    assert streams == encode_mixtures(symbols, mixtures, threads=3, **options)
    assert torch.equal(decode_mixtures(streams, mixtures, threads=2, **options), symbols)


@pytest.mark.parametrize("seed", range(4))
def test_the_integers_are_those_of_the_definition(seed):
    """A few of what `python tests/coding/millions.py` compares: one of the draws with every number of components."""
    assert millions.compare(seed) == millions.POINTS * millions.CHANNELS


def test_a_stream_of_tables_and_mixtures_in_portions():
    symbols, mixtures = draw(11, 24, wild=True)
    index = torch.full((7,), 20)
    encoder = coding.Encoder()
    encoder.put_mixtures(symbols[:5], Mixtures(*(part[:5] for part in mixtures)))
    encoder.put(torch.arange(7), coding.gaussian_tables(), index)
    encoder.put_mixtures(symbols[5:], Mixtures(*(part[5:] for part in mixtures)))
    with pytest.raises(ValueError, match="mixtures must have means"):  # leaves nothing behind
        encoder.put_mixtures(symbols, mixtures._replace(weights=mixtures.weights + 1))
    decoder = coding.Decoder(encoder.finish())
    assert torch.equal(decoder.get_mixtures(Mixtures(*(part[:5] for part in mixtures))), symbols[:5])
    assert decoder.get(coding.gaussian_tables(), index).tolist() == list(range(7))
    rest = Mixtures(*(part[5:].reshape(2, 3, 3, 24) for part in mixtures))  # any shape before [K, C]
    assert torch.equal(decoder.get_mixtures(rest), symbols[5:].view(2, 3, 24))
    decoder.finish()


def test_the_length_is_that_of_the_entropy():
    symbols, mixtures = draw(200, 192)
    tables, flat = tables_of(mixtures), symbols.flatten()
    bins = (flat - tables.offset).long()[:, None]
    width = tables.cdf.gather(1, bins + 1) - tables.cdf.gather(1, bins)
    bits = -(width.double() / 65536).log2().sum().item()
    [stream] = encode_mixtures(symbols, mixtures)
    assert 8 * len(stream) <= 1.001 * bits + 64 * 2 + 32


def test_constriction_agrees():
    """Another coder, with the same probabilities: the same symbols, and as many bits."""
    constriction = pytest.importorskip("constriction", reason="requirements-peers.txt has it")
    symbols, mixtures = draw(30, 64)
    tables = tables_of(mixtures)
    # Equal rows: a bin that a row lacks gets next to nothing.
    rows = tables.cdf.diff(dim=1).clamp(min=0).double().numpy() / 65536
    bins = (symbols.flatten() - tables.offset).numpy()
    family = constriction.stream.model.Categorical(perfect=False)
    coder = constriction.stream.stack.AnsCoder()
    coder.encode_reverse(bins, family, rows)
    bits = coder.num_bits()
    [stream] = encode_mixtures(symbols, mixtures, lanes=1)
    assert abs(8 * len(stream) - bits) < 0.002 * bits + 64
    again = torch.from_numpy(coder.decode(family, rows)) + tables.offset
    assert torch.equal(decode_mixtures([stream], mixtures, lanes=1).flatten(), again.int())


def test_damage_is_told_or_harmless():
    """Cut, continued, changed and spliced streams, with wide windows; a changed escape is just another symbol."""
    symbols, mixtures = draw(4, 50, wild=True)
    low, half = vlkern.ops.mixture_window(*mixtures)
    symbols = symbols.clamp(low, low + 2 * half - 1)
    [stream] = encode_mixtures(symbols, mixtures)
    [other] = encode_mixtures(symbols.flip(0), Mixtures(*(part.flip(0) for part in mixtures)))
    damaged = [stream[:end] for end in range(0, len(stream), 5)] + [stream + b"\0"]
    damaged += [stream[:cut] + other[cut:] for cut in range(20, len(stream) - 20, 7)]
    for bit in range(0, 8 * len(stream), 13):
        changed = bytearray(stream)
        changed[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(changed))
    told = 0
    for bad in damaged:
        try:
            assert not torch.equal(decode_mixtures([bad], mixtures), symbols)
        except DamagedStream:
            told += 1
    assert told > 0.9 * len(damaged)


def test_bad_arguments_are_told():
    symbols, mixtures = draw(2, 3)

    def refused(message, error=ValueError, symbols=symbols, **parts):
        with pytest.raises(error, match=message):
            encode_mixtures(symbols, mixtures._replace(**parts))

    refused("symbols must have shape", symbols=symbols[:1])
    refused("symbols must be integers", TypeError, symbols=symbols.float())
    refused("means must be int32", TypeError, means=mixtures.means.long())
    refused("scales must be uint8", TypeError, scales=mixtures.scales.int())
    refused("weights must have shape", weights=mixtures.weights[:, :2])
    refused("K from 1 to 16", means=torch.zeros(2, 17, 3, dtype=torch.int32))
    refused("K from 1 to 16", means=torch.zeros(3, dtype=torch.int32))
    refused("scales from 0 to 63", scales=mixtures.scales + 64)
    far = mixtures.means.clone()
    far[1, 2, 2] = 2**23 + 1
    refused("means of at most 2", means=far)
    negative = mixtures.weights.clone()
    negative[1, :, 2] = torch.tensor([-1, 4096, 1])
    refused("a sum of 4096", weights=negative)
    with pytest.raises(ValueError, match="a sum of 4096"):
        decode_mixtures(encode_mixtures(symbols, mixtures), mixtures._replace(weights=mixtures.weights * 2))
    with pytest.raises(ValueError, match="mixtures must have the precision of the coder, 20, got 16"):
        coding.Encoder(precision=20).put_mixtures(symbols, mixtures)
    with pytest.raises(ValueError, match="cu_seqlens must rise"):
        encode_mixtures(symbols, mixtures, cu_seqlens=[0, 5])
    with pytest.raises(ValueError, match="streams must be 1"):
        decode_mixtures([], mixtures)
    with pytest.raises(ValueError, match="lanes must be"):
        encode_mixtures(symbols, mixtures, lanes=0)
    with pytest.raises(ValueError, match="kind must be"):
        decode_mixtures([b""], mixtures, kind="tans")

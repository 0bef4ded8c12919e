"""Streams that a GPU decodes. tests/cuda/test_emulated_rans.py tries every case on an emulated one."""

import pytest
import torch
from test_rans_mixtures import EXTREMES, draw

from vlkern import coding
from vlkern.coding import DamagedStream, Mixtures, gpu

CPU = torch.device("cpu")


def test_streams_begin_at_multiples_of_eight():
    streams = [b"", b"123456789", b"12345678", b"1"]
    data, spans = gpu.pack(streams, [0, 0, 4, 4, 9], CPU)
    assert spans.tolist() == [[0, 0, 0, 0], [0, 9, 0, 4], [2, 8, 4, 4], [3, 1, 4, 9]]
    assert [bytes(data[8 * at : 8 * at + n].tolist()) for at, n, _, _ in spans.tolist()] == streams
    data, spans = gpu.pack([], [0], CPU)
    assert data.shape == (0,) and spans.shape == (0, 4)


def test_without_a_gpu_nothing_changes():
    assert not gpu.decodes(CPU)
    tables = coding.gaussian_tables()
    assert all(a is b for a, b in zip(tables.on(CPU), (tables.cdf, tables.size, tables.offset), strict=True))


@pytest.fixture
def device():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    found = torch.device("cuda", torch.cuda.current_device())
    assert gpu.decodes(found)
    return found


@pytest.mark.parametrize("kind", coding.rans.KINDS)
@pytest.mark.parametrize("lanes", [2, 32, 100])
def test_tables_on_a_gpu(device, kind, lanes):
    g = torch.Generator().manual_seed(0)
    tables = coding.gaussian_tables()
    index = torch.randint(0, 48, (20, 5000), generator=g)
    symbols = (torch.randn(index.shape, generator=g) * torch.tensor(coding.SCALES)[index]).round().int()
    symbols[:, ::500] = torch.tensor(EXTREMES)[torch.arange(10) % len(EXTREMES)]
    options = {"cu_seqlens": range(0, 100_001, 2500), "lanes": lanes, "kind": kind}
    streams = coding.encode(symbols, tables, index, **options)
    found = coding.decode(streams, tables, index.to(device), **options)
    assert found.device == device and torch.equal(found.cpu(), symbols)
    spoilt = [*streams[:-1], streams[-1][:-1]]
    with pytest.raises(DamagedStream):
        coding.decode(spoilt, tables, index.to(device), **options)
    rows = coding.Tables(*(part[index[0]].to(device) for part in (tables.cdf, tables.size, tables.offset)))
    assert torch.equal(coding.decode(coding.encode(symbols[0], rows), rows).cpu(), symbols[0])


@pytest.mark.parametrize("wild", [False, True])
@pytest.mark.parametrize("lanes", [2, 32, 100])
def test_mixtures_on_a_gpu(device, lanes, wild):
    symbols, mixtures = draw(640, 192, wild=wild)
    symbols.view(-1)[::1999] = 7000
    options = {"cu_seqlens": range(0, 640 * 192 + 1, 32 * 192), "lanes": lanes}
    streams = coding.encode_mixtures(symbols, mixtures, **options)
    found = coding.decode_mixtures(streams, Mixtures(*(part.to(device) for part in mixtures)), **options)
    assert found.device == device and torch.equal(found.cpu(), symbols)

"""The native code under AddressSanitizer and UndefinedBehaviorSanitizer: ops, packing and entropy coding."""

import subprocess
import sys
from pathlib import Path

import pytest
from rooms import ROOT
from sandbox import COMPILER, SANITIZERS, run, start

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not COMPILER, reason="the run-time libraries come with g++")]

# Reads a buffer of 16 floats that PyTorch allocated, and adds to an int.
FAULTY = """
extern "C" float read(const float* p, long i) { return p[i]; }
extern "C" int next(int i) { return i + 1; }
"""
LOAD = "import ctypes, sys; library = ctypes.CDLL(sys.argv[1])\n"
READ = "import torch; x = torch.ones(16)\nfor i in (15, 16): print(i, flush=True); "
READ = LOAD + READ + "library.read(ctypes.c_void_p(x.data_ptr()), ctypes.c_long(i))"
NEXT = LOAD + "for i in (1, 2**31 - 1): print(i, flush=True); library.next(i)"

EVERY_SAMPLE = """
from importlib import import_module
from pathlib import Path
import sys
import numpy as np
import torch, vlkern
from vlkern import coding
from vlkern._op import REGISTRY
from vlkern.codec.integer import IntegerEntropy, Latents, convert
from vlkern.codec.integer.measure import mixtures_of
from vlkern.packing import METHODS, pack
from vlkern.testing import differentiate, evaluate

package = Path(vlkern.__file__).parent
assert package.is_relative_to(sys.argv[1]), package
sanitized = {line.split()[-1] for line in open("/proc/self/maps") if "/vlkern/_C" in line}
assert sanitized == {str(package / "_C.so")}, sanitized
for name, op in REGISTRY.items():
    if "cpu" in op.backends:
        room = import_module(f"vlkern.kernels.{name}.samples")
        for sample in (s for s in room.SAMPLES if not s.bench):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                arguments, options = room.inputs(sample, dtype, "cpu")
                with vlkern.backend(f"{name}=cpu"):
                    run = differentiate if op.differentiable else evaluate
                    run(getattr(vlkern.ops, op.public), arguments, options)
                print(name, sample.name, dtype)
for method in METHODS:
    for n in (0, 1, 2, 3, 1000):
        pack(np.random.default_rng(n).integers(1, 101, n), 100, method=method)
tables, draw = coding.gaussian_tables(coding.SCALES[:40]), np.random.default_rng(0)
index = torch.from_numpy(draw.integers(0, 40, 200, dtype=np.int32))
symbols = torch.from_numpy(draw.integers(-(2**31), 2**31, 200) >> draw.integers(0, 32, 200)).int()
for lanes in (1, 3):
    [stream] = coding.encode(symbols, tables, index, lanes=lanes)
    assert torch.equal(coding.decode([stream], tables, index, lanes=lanes), symbols)
    for _ in range(1000):
        damaged = bytearray(stream[: draw.integers(1, len(stream) + 1)])
        damaged[draw.integers(len(damaged))] ^= 1 << draw.integers(8)
        try:
            coding.decode([bytes(damaged)], tables, index, lanes=lanes)
        except coding.DamagedStream:
            pass
model = vlkern.models.create("m2t-tiny")
tokens = torch.from_numpy(draw.integers(-(2**31), 2**31, (2, 16, 16))).float()
known = torch.ones(2, 16, dtype=torch.bool)
integer = IntegerEntropy(model.config, convert(model, [Latents(tokens / 2**28, known, 1)]), backend="cpu")
mixtures_of(integer, Latents(tokens, known, 1))
g = torch.Generator().manual_seed(0)
params = torch.randn(9, 3, 3, 21, generator=g) * torch.tensor([1.0, 20.0, 3.0])[:, None, None]
mixtures, symbols = coding.quantize_mixture(params), symbols[:189].view(9, 21)
symbols[3:] = (torch.randn(6, 21, generator=g) * 20).int()
[stream] = coding.encode_mixtures(symbols, mixtures)
assert torch.equal(coding.decode_mixtures([stream], mixtures), symbols)
for _ in range(500):
    damaged = bytearray(stream[: draw.integers(16, len(stream) + 1)])
    damaged[draw.integers(len(damaged))] ^= 1 << draw.integers(8)
    try:
        coding.decode_mixtures([bytes(damaged)], mixtures)
    except coding.DamagedStream:
        pass
print("done")
"""


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faulty")
    source, library = folder / "faulty.cpp", folder / "faulty.so"
    source.write_text(FAULTY)
    flags = ("-shared", "-fPIC", f"-fsanitize={SANITIZERS}", "-fno-sanitize-recover=undefined")
    subprocess.run([COMPILER, *flags, source, "-o", library], check=True)
    return library


@pytest.mark.parametrize(
    ("code", "last", "report"),
    [(READ, 16, "heap-buffer-overflow"), (NEXT, 2**31 - 1, "signed integer overflow")],
    ids=["read", "add"],
)
def test_the_sanitizers_see_a_fault(faulty: Path, code: str, last: int, report: str) -> None:
    """And nothing in the call before, which is right."""
    result = start(sys.executable, "-c", code, faulty, sanitized=True)
    assert result.returncode != 0 and result.stdout.endswith(f"{last}\n") and result.stdout.count("\n") == 2
    assert report in result.stderr


def test_every_sample_is_clean(installed: Path, tmp_path: Path) -> None:
    said = run(installed / "bin" / "python", "-c", EVERY_SAMPLE, installed, cwd=tmp_path, sanitized=True)
    assert said.endswith("done\n")


def test_damaged_files_are_refused(installed: Path, tmp_path: Path) -> None:
    run(installed / "bin" / "python", ROOT / "tests/codec/corruptions.py", 200, cwd=tmp_path, sanitized=True)

"""The bf16 kernels on emulated AMX tiles (emulator/): every index, mask, padding and sum, without the hardware."""

import ctypes
import platform
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rooms import ROOT

from vlkern._op import REGISTRY
from vlkern.kernels import interval_attention, linear_cross_entropy, sigmoid_loss
from vlkern.testing import assert_as_good, assert_same_direction, in_float64, poison

HERE, TORCH = Path(__file__).parent, Path(torch.__file__).parent
BF16 = torch.bfloat16

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the kernels are there on x86-64 only")

FLAGS = [
    *["-std=c++20", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-Wl,-Bsymbolic", "-fopenmp-simd"],
    *["-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"],
    *["-DTORCH_TARGET_VERSION=0x020b000000000000", "-I", HERE / "emulator", "-I", ROOT / "csrc"],
    *["-isystem", TORCH / "include"],
]
LIBRARIES = [TORCH / "lib/libtorch_cpu.so", TORCH / "lib/libc10.so"]

# Names of their own, because the real kernels are in this process, too; nothing for instruction sets that this machine
# may lack, and, to compile less, no kernels for those that it has.
EDITS = [
    (r"\(vlkern, CPU", "(vlkern_amx, CPU"),
    (r"#pragma GCC target.*", ""),
    (r"if \(__builtin_cpu_supports\(.x86-64.*", ""),
]


def edited(path):
    code = path.read_text()
    for pattern, replacement in EDITS:
        code = re.sub(pattern, replacement, code)
    return code


def build(folder, room):
    """Compiles a room's cpu.cpp for the emulated tiles, as torch.ops.vlkern_amx."""
    code = edited(ROOT / "kernels" / room / "cpu.cpp")
    source, library = folder / f"{room}.cpp", folder / f"{room}.so"
    source.write_text(code)
    (folder / "levels.inc").write_text(edited(ROOT / "csrc/levels.inc"))  # found before the one in csrc
    sources = [source, *([ROOT / "csrc/cpu/sgemm.cpp"] if "sgemm.h" in code else [])]
    subprocess.run(["g++", *FLAGS, "-I", ROOT / "kernels" / room, *sources, *LIBRARIES, "-o", library], check=True)
    names = torch.library.Library("vlkern_amx", "FRAGMENT")
    for raw, overloads in REGISTRY[room].raw.items():
        names.define(str(overloads["cpu"]._schema).removeprefix("vlkern::"))
        assert overloads["cpu"]._schema.name == f"vlkern::{raw}"
    torch.ops.load_library(library)
    return SimpleNamespace(library=ctypes.CDLL(str(library)), names=names, op=REGISTRY[room])


@pytest.fixture(scope="module")
def attention(tmp_path_factory):
    if int(subprocess.check_output(["g++", "-dumpversion"], text=True).split(".")[0]) < 12:
        pytest.skip("g++ 11 compiles interval_attention for no instruction set but the default")
    return build(tmp_path_factory.mktemp("amx"), "interval_attention")


@pytest.fixture(scope="module")
def sigmoid(tmp_path_factory):
    return build(tmp_path_factory.mktemp("amx"), "sigmoid_loss")


def run(room, raw, backend, *args):
    """A raw op; "tiles" must multiply tiles."""
    before = room.library.tile_products()
    with poison():
        op = getattr(torch.ops.vlkern_amx, raw).cpu if backend == "tiles" else room.op.raw[raw][backend]
        result = op(*args)
    assert (room.library.tile_products() > before) == (backend == "tiles" and args[0].dtype == BF16)
    return result if isinstance(result, tuple) else (result,)


def attend(room, backend, grads, args):
    """out, lse, dq, dk, dv."""
    grad, grad_lse = (None if g is None else g.to(args[0]) for g in grads)
    out, lse = run(room, "interval_attention", backend, *args)
    grad_lse = None if grad_lse is None else grad_lse.to(lse.dtype)
    q, k, v, *rest = args
    return out, lse, *run(room, "interval_attention_backward", backend, grad, grad_lse, q, k, v, out, lse, *rest)


def compare(room, *args, through_lse=False, **kwargs):
    """Against the reference in float64; the same bits on two threads. Returns what the tiles gave."""
    args = room.op.bind(*args, **kwargs)
    q, _, v, *_ = args
    g = torch.Generator().manual_seed(1)
    grad = torch.randn(*q.shape[:2], v.shape[2], generator=g).to(BF16)
    grads = grad, torch.randn(q.shape[:2], generator=g).to(BF16) if through_lse else None
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        ours = attend(room, "tiles", grads, args)
        torch.set_num_threads(2)
        assert all(map(torch.equal, ours, attend(room, "tiles", grads, args)))
    finally:
        torch.set_num_threads(before)
    low, exact = attend(room, "reference", grads, args), attend(room, "reference", grads, in_float64(args))
    none = exact[1] == -torch.inf
    assert torch.equal(ours[1] == -torch.inf, none)
    sizes = interval_attention.samples.magnitudes(grad, *args[:5], scale=args[5], softcap=args[6])
    for i, (one, two, three) in enumerate(zip(ours, low, exact, strict=True)):
        results = [t.masked_fill(none, 0) for t in (one, two, three)] if i == 1 else [one, two, three]
        assert_as_good(*results, magnitude=sizes[i - 2] if i >= 2 else None)
        if i >= 2:
            assert_same_direction(*results)
    return ours


def problem(nq, nk, hq, hkv, d, dv, seed=0):
    """q, k, v and random intervals: in no order, overlapping, beyond the keys, some empty."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(*size, generator=g).to(BF16) for size in [(nq, hq, d), (nk, hkv, d), (nk, hkv, dv)])
    start, stop = torch.randint(-3, nk + 4, (2, nq), generator=g, dtype=torch.int32).sort(0).values
    return q, k, v, start, torch.where(torch.rand(nq, generator=g) < 0.1, start - 1, stop)


SMALL = [s for s in interval_attention.samples.SAMPLES if not s.bench and s.lengths]


@pytest.mark.parametrize("sample", SMALL, ids=lambda s: s.name)
def test_attention_on_its_samples(attention, sample):
    args, kwargs = interval_attention.samples.inputs(sample, BF16, "cpu")
    compare(attention, *args, **kwargs, through_lse=sample.mask != "random")  # whose empty rows have no LSE


@pytest.mark.parametrize(
    ("nq", "nk", "hq", "hkv", "d", "dv", "options"),
    [
        (40, 33, 1, 1, 8, 8, {}),
        (300, 290, 2, 1, 40, 72, {}),  # two blocks of rows, three tiles of keys
        (70, 170, 4, 2, 64, 64, {"softcap": 3.0}),
        (260, 140, 2, 2, 72, 72, {"scale": -0.7}),
        (129, 257, 3, 1, 80, 40, {"scale": 0.0}),
        (32, 128, 2, 1, 128, 128, {"softcap": 2.0, "scale": 50.0}),  # exactly one panel and one tile
        (64, 100, 1, 1, 256, 8, {}),
        (257, 40, 2, 1, 8, 256, {}),
    ],
)
def test_attention_at_every_head_dim(attention, nq, nk, hq, hkv, d, dv, options):
    compare(attention, *problem(nq, nk, hq, hkv, d, dv), **options)


@pytest.mark.parametrize("ordered", [True, False], ids=["in_order", "in_no_order"])
@pytest.mark.parametrize("width", [1, 31, 100])
def test_attention_through_windows(attention, width, ordered):
    """Panels that start inside a tile, and steps of keys that only some panels of a block see."""
    q, k, v, start, _ = problem(300, 400, 1, 1, 24, 40, seed=width)
    start = start.sort().values if ordered else start
    compare(attention, q, k, v, start, start + width)


def test_attention_of_panels_that_start_inside_a_step_of_keys(attention):
    """All 32 rows of a panel see the same keys, so that none but those that fill the step are masked."""
    q, k, v, *_ = problem(96, 200, 1, 1, 16, 16)
    start = torch.arange(96, dtype=torch.int32) // 32 * 37
    compare(attention, q, k, v, start, torch.full_like(start, 200))


def test_attention_does_not_see_its_neighbours(attention):
    """Documents of 45, 70 and 200 tokens; the first and the last hold NaN, also in the gradient that comes in."""
    q, k, v, *_ = problem(315, 315, 2, 1, 40, 24)
    grad = torch.randn(315, 2, 24, generator=torch.Generator().manual_seed(2)).to(BF16)
    lengths = torch.tensor([45, 70, 200])
    stop = lengths.cumsum(0).repeat_interleave(lengths).int()
    start = stop - lengths.repeat_interleave(lengths).int()
    middle, rest = slice(45, 115), (0.3, None)
    alone = attend(
        attention,
        "tiles",
        (grad[middle], None),
        (q[middle], k[middle], v[middle], start[middle] - 45, stop[middle] - 45, *rest),
    )
    for t in (q, k, v, grad):
        t[:45] = t[115:] = torch.nan
    packed = attend(attention, "tiles", (grad, None), (q, k, v, start, stop, *rest))
    for one, two in zip(alone, packed, strict=True):
        assert torch.equal(one, two[middle])


def test_attention_ignores_rows_without_keys(attention):
    """Whatever they hold."""
    q, k, v, start, stop = problem(70, 90, 1, 1, 16, 16)
    none = torch.arange(70) % 3 == 1
    stop = torch.where(none, start, stop.clamp(min=1))
    grad, rest = torch.ones(70, 1, 16, dtype=BF16), (start, stop, 0.25, None)
    plain = attend(attention, "tiles", (grad, None), (q, k, v, *rest))
    q[none] = torch.nan
    assert all(map(torch.equal, plain, attend(attention, "tiles", (grad, None), (q, k, v, *rest))))


@pytest.mark.parametrize(("d", "forward", "backward"), [(64, 64 + 64, 5 * 64), (72, 96 + 80, 96 + 96 + 3 * 80)])
def test_attention_multiplies_no_more_tiles_than_it_must(attention, d, forward, backward):
    """The inner dimension of a product is padded to 32, an outer one to 16."""
    q, k, v, start, stop = problem(256, 128, 1, 1, d, d)
    args = (q, k, v, torch.zeros_like(start), torch.full_like(stop, 128), 0.1, None)
    pairs, tile = 256 * 128, 16 * 16 * 32
    before = attention.library.tile_products()
    out, lse = run(attention, "interval_attention", "tiles", *args)
    between = attention.library.tile_products()
    run(attention, "interval_attention_backward", "tiles", out, None, *args[:3], out, lse, *args[3:])
    assert (between - before) * tile == forward * pairs
    assert (attention.library.tile_products() - between) * tile == backward * pairs


@pytest.mark.parametrize("sample", [s for s in sigmoid_loss.samples.SAMPLES if s.b < 1000], ids=lambda s: s.name)
def test_sigmoid_loss_on_its_samples(sigmoid, sample):
    given, kwargs = sigmoid_loss.samples.inputs(sample, BF16, "cpu")
    image, text, scale, bias, count, *rest = sigmoid.op.bind(*given, **kwargs)
    args = image, text, scale, bias, 1 / count, *rest
    wide = in_float64(args)
    ours, low, exact = (
        run(sigmoid, "sigmoid_loss_grad", b, *a) for b, a in (("tiles", args), ("reference", args), ("reference", wide))
    )
    _, _, dots, z, mask = sigmoid_loss.reference._terms(*wide[:4], *wide[5:])
    g = wide[4] * mask * torch.sigmoid(-z * (wide[2] * dots + wide[3]))
    magnitudes = None, None, None, (g * dots.abs()).sum(), g.sum()
    for *results, magnitude in zip(ours, low, exact, magnitudes, strict=True):
        assert_as_good(*results, magnitude=magnitude)
        assert_same_direction(*results)
    assert torch.equal(ours[0], run(sigmoid, "sigmoid_loss", "tiles", *args)[0])


@pytest.fixture(scope="module")
def cross_entropy(tmp_path_factory):
    return build(tmp_path_factory.mktemp("amx"), "linear_cross_entropy")


SAMPLES = [
    *(s for s in linear_cross_entropy.samples.SAMPLES if not s.bench and s.t),
    linear_cross_entropy.samples.Sample("several_chunks_of_classes", 70, 2100, 40, {"softcap": 5.0}, ignored=True),
]


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.name)
def test_cross_entropy_on_its_samples(cross_entropy, sample):
    """Sums, gradients from them, and both at once; also for hidden or weight alone."""
    given, kwargs = linear_cross_entropy.samples.inputs(sample, BF16, "cpu")
    kwargs.pop("bias", None)
    hidden, weight, _, target, cap, scale, smoothing, z_loss = cross_entropy.op.bind(*given, **kwargs)
    share = torch.rand(sample.t, generator=torch.Generator().manual_seed(1))
    args, terms = (hidden, weight, None, target), (cap, scale, smoothing, None, z_loss)
    both = (*args, share, *terms, True, True)

    ours = run(cross_entropy, "linear_cross_entropy_sweep", "tiles", *both)
    low, exact = (run(cross_entropy, "linear_cross_entropy_sweep", "reference", *a) for a in (both, in_float64(both)))
    sizes = linear_cross_entropy.samples.magnitudes(share, *given, **{**kwargs, "reduction": "sum"})
    for *results, magnitude in zip(ours, low, exact, (None, None, None, *sizes, None), strict=True):
        assert_as_good(*results, magnitude=magnitude)
    for i in (3, 4):
        assert_same_direction(ours[i], low[i], exact[i])

    sums = run(cross_entropy, "linear_cross_entropy", "tiles", *args, cap, scale)
    assert all(map(torch.equal, sums, ours))
    name, given_lse = "linear_cross_entropy_grad", (*args, share, sums[0], *terms)
    assert all(map(torch.equal, run(cross_entropy, name, "tiles", *given_lse, True, True), ours[3:]))
    assert torch.equal(run(cross_entropy, name, "tiles", *given_lse, True, False)[0], ours[3])
    assert torch.equal(run(cross_entropy, name, "tiles", *given_lse, False, True)[1], ours[4])

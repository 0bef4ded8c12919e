"""The whole-number transformer: the same integers from every backend, instruction set, thread count and batch."""

import dataclasses
import hashlib
import math

import pytest
import torch

from vlkern import models
from vlkern.codec.integer import IntegerEntropy, Latents, Weights, arithmetic, convert
from vlkern.codec.integer.__main__ import main
from vlkern.codec.integer.measure import cost, mixtures_of
from vlkern.codec.integer.steps import Native, choose
from vlkern.codec.integer.weights import FILE, SYMBOLS, Attention, Dense, Layer, Norm
from vlkern.data import photos
from vlkern.errors import UserError
from vlkern.models.m2t import M2T, M2TConfig

POWERS = arithmetic.powers()
#: 0 is the best that this machine has: AVX-512 where there is one.
LEVELS = {"best": Native(0), "portable": Native(1), "avx2": Native(2)}
EACH_LEVEL = pytest.mark.parametrize("native", LEVELS.values(), ids=list(LEVELS))


def ints(g, low, high, *shape, dtype=torch.int32):
    """Uniform, with the ends among them."""
    x = torch.randint(low, high + 1, shape, generator=g, dtype=torch.int64)
    if x.numel() > 2:
        x.view(-1)[0], x.view(-1)[-1] = low, high
    return x.to(dtype)


def same(ones, others):
    for one, other in zip(ones, others, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def test_the_native_steps_are_there():
    assert isinstance(choose(torch.device("cpu")), Native)
    for name in ("linear", "norm", "attention", "mixture"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"vlkern::integer_{name}", "CPU"), name
    with pytest.raises(ValueError, match="backend must be auto, cpu or reference, got 'fast'"):
        choose(torch.device("cpu"), "fast")
    with pytest.raises(RuntimeError, match="the tensors are on meta"):
        choose(torch.device("meta"), "cpu")


@EACH_LEVEL
def test_linear(native):
    g = torch.Generator().manual_seed(0)
    for m, k, n in ((0, 4, 4), (1, 1, 1), (7, 33, 17), (97, 64, 31), (13, 192, 48)):
        x, weight = ints(g, -2047, 2047, m, k, dtype=torch.int16), ints(g, -127, 127, n, k, dtype=torch.int8)
        bias, multiplier = ints(g, -(2**29), 2**29, n), ints(g, 0, 2**31 - 1, n)
        for shift, limit in ((46, 2047), (33, arithmetic.RESIDUAL), (62, 5), (1, 32767)):
            args = (bias, multiplier, shift, limit)
            same([native.linear(x, native.prepare(weight), *args)], [arithmetic.linear(x, weight, *args)])
        table = ints(g, -32767, 32767, 2 * 2047 + 1, dtype=torch.int16)
        args = (bias, multiplier, 46, 2047, table)
        same([native.linear(x, native.prepare(weight), *args[:4], table=table)], [arithmetic.linear(x, weight, *args)])


@EACH_LEVEL
def test_norm(native):
    g = torch.Generator().manual_seed(1)
    for width in (1, 3, 64, arithmetic.WIDEST):
        gain, bias = ints(g, -(2**31), 2**31 - 1, width), ints(g, -(2**60), 2**60, width, dtype=torch.int64)
        for size in (0, 1, 1000, arithmetic.RESIDUAL):
            x = ints(g, -size, size, 3, width)
            x[0] = torch.where(torch.arange(width) % 2 == 0, size, -size)  # the largest variance
            x[1] = size
            for args in ((gain, bias, 60, 2047, 1), (gain // 2**12, bias >> 20, 24, 32767, 2**47)):
                same([native.norm(x, *args)], [arithmetic.norm(x, *args)])


@EACH_LEVEL
def test_attention(native):
    g = torch.Generator().manual_seed(2)
    for tiles, slots, heads, channels, start, stop in ((1, 4, 1, 1, 0, 1), (2, 33, 2, 5, 3, 33), (1, 40, 3, 32, 7, 31)):
        qkv = ints(g, -2047, 2047, tiles, slots, 3 * heads * channels, dtype=torch.int16)
        for shift in (0, 6, 13, 30):
            args = (qkv, start, stop, heads, shift, POWERS, 2**31 - 1, 45, 2047)
            same([native.attention(*args)], [arithmetic.attention(*args)])


def test_mixture():
    g = torch.Generator().manual_seed(3)
    for components in (1, 2, 3, 7):
        for size in (0, 3000, arithmetic.RESIDUAL):  # 0: all logits are equal, ties go to the first
            raw = ints(g, -size, size, 2, 3, 3, components, 5)
            found = arithmetic.mixture(raw, POWERS)
            same(LEVELS["best"].mixture(raw, POWERS), found)
            assert (found[2].long().sum(-2) == 4096).all() and (found[2] >= 0).all() and (found[1] <= 63).all()
    tie = arithmetic.mixture(torch.zeros(3, 3, 1, dtype=torch.int32), POWERS)[2]
    assert tie.flatten().tolist() == [1366, 1365, 1365]


def test_powers_and_roots_are_exact():
    wanted = [round(2**15 * 2 ** (-i / 1024)) for i in range(1024)]
    assert POWERS.tolist() == wanted and POWERS[0] == 2**15
    g = torch.Generator().manual_seed(4)
    r = ints(g, 1, 2**31 - 1, 1000, dtype=torch.int64)
    for x, wanted in ((r * r, r), (r * r - 1, r - 1), (r * r + 2 * r, r)):
        assert torch.equal(arithmetic.root(x), wanted)


CONFIGS = {
    "even": M2TConfig(channels=6, width=16, depth=2, heads=2, mlp=24, tile=3, steps=3, components=3),
    "odd": M2TConfig(channels=5, width=24, depth=1, heads=3, mlp=33, tile=5, steps=4, components=2),
}  # fmt: skip


def random_weights(config, seed, extreme=False):
    """Integers of any value that `check` allows, drawn without floats; extreme: all sums as large as they may be."""
    g = torch.Generator().manual_seed(seed)
    c, width = config, config.width

    def dense(inputs, outputs, largest, size, table=None):
        """Its results are about as large as `size`."""
        weight = ints(g, -127, 127, outputs, inputs, dtype=torch.int8)
        if extreme:
            weight = torch.where(weight < 0, -127, 127).to(torch.int8)
        room = 2**31 - 1 - int(weight.long().abs().sum(1).max()) * largest
        bias = ints(g, -room, room, outputs) if extreme else ints(g, -(2**12), 2**12, outputs)
        shift = 31 + max(0, round(math.log2(largest * 64 * math.sqrt(inputs) / size)))
        limit = arithmetic.RESIDUAL if size > 2047 else 2047
        return Dense(weight, bias, ints(g, 2**30, 2**31 - 1, outputs), shift, limit, table)

    def norm():
        bias = ints(g, -(2**30), 2**30, width, dtype=torch.int64)
        return Norm(ints(g, -(2**25), 2**25, width), bias, 29, 2047, 1)

    size = arithmetic.RESIDUAL if extreme else 2**18

    def layer():
        table = ints(g, -2047, 2047, 2 * 2047 + 1, dtype=torch.int16)
        return Layer(
            norm(), dense(width, 3 * width, 2047, 2047), Attention(10, 2**30, 44, 2047),
            dense(width, width, 2047, size), norm(),
            dense(width, c.mlp, 2047, 2047, table), dense(c.mlp, width, 2047, size),
        )  # fmt: skip

    tables = [ints(g, -size, size, *shape) for shape in ((width,), (c.tokens, width), (c.levels, width))]
    layers = tuple(layer() for _ in range(c.depth))
    head = dense(width, 3 * c.components * c.channels, 2047, 2**13)
    return Weights(dense(c.channels, width, SYMBOLS, size), *tables, layers, norm(), head)


def latents(config, tiles, seed, size=40, level=1):
    g = torch.Generator().manual_seed(seed)
    tokens = ints(g, -size, size, tiles, config.tokens, config.channels)
    known = torch.rand(tiles, config.tokens, generator=g) < 0.8
    return Latents(torch.where(known[..., None], tokens, 0), known, level)


@pytest.mark.parametrize("extreme", [False, True], ids=["typical", "extreme"])
@pytest.mark.parametrize("name", CONFIGS)
def test_whatever_computes_them_the_mixtures_are_the_same(name, extreme):
    config = CONFIGS[name]
    weights = random_weights(config, 5, extreme)
    sample = latents(config, 4, 6, size=2**31 - 1 if extreme else 40)
    entropy = IntegerEntropy(config, weights, backend="reference")
    wanted = mixtures_of(entropy, sample)
    assert wanted.means.unique().numel() > (2 if extreme else 20) and wanted.scales.unique().numel() > 1
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            same(mixtures_of(IntegerEntropy(config, weights, backend="cpu"), sample), wanted)
    finally:
        torch.set_num_threads(threads)
    if torch.cuda.is_available():
        same(mixtures_of(IntegerEntropy(config, weights, device="cuda"), sample), wanted)
    for native in LEVELS.values():
        entropy = IntegerEntropy(config, weights)
        entropy._steps = native
        same(mixtures_of(entropy, sample), wanted)
        alone = [
            mixtures_of(entropy, Latents(sample.tokens[i : i + 1], sample.known[i : i + 1], sample.level))
            for i in range(4)
        ]
        same([torch.cat(parts) for parts in zip(*alone, strict=True)], wanted)


def test_symbols_beyond_the_range_are_embedded_like_its_ends():
    config = CONFIGS["even"]
    entropy = IntegerEntropy(config, random_weights(config, 7))
    sample = latents(config, 2, 8, size=2**15)
    clamped = dataclasses.replace(sample, tokens=sample.tokens.clamp(-SYMBOLS, SYMBOLS))
    assert not torch.equal(sample.tokens, clamped.tokens)
    same(mixtures_of(entropy, sample), mixtures_of(entropy, clamped))


def test_the_arithmetic_is_frozen():
    """Files depend on it: another digest is another format."""
    config = CONFIGS["odd"]
    found = mixtures_of(IntegerEntropy(config, random_weights(config, 9)), latents(config, 2, 10))
    digest = hashlib.sha256(b"".join(part.numpy().tobytes() for part in found)).hexdigest()[:16]
    assert digest == "826841e0285237e9"


def test_steps_refuse_what_does_not_follow():
    config = CONFIGS["even"]
    weights = random_weights(config, 11)
    entropy = IntegerEntropy(config, weights)
    with pytest.raises(ValueError, match="level must be from 0 to 16, got 17"):
        entropy.begin(1, 17)
    with pytest.raises(ValueError, match="tiles must be positive, got 0"):
        entropy.begin(0, 0)
    state = entropy.begin(1, 0)
    with pytest.raises(ValueError, match="tokens must be None at step 0"):
        entropy.step(state, torch.zeros(1, 1, 6, dtype=torch.int32), None)
    entropy.step(state, None, None)
    with pytest.raises(ValueError, match=r"tokens must be \[1, 1, 6\] at step 1, got None"):
        entropy.step(state, None, None)
    with pytest.raises(ValueError, match="there is no MT in integers"):
        IntegerEntropy(dataclasses.replace(config, bidirectional=True), weights)


def changed(weights, **fields):
    layer = dataclasses.replace(weights.layers[0], **fields)
    return dataclasses.replace(weights, layers=(layer, *weights.layers[1:]))


def test_weights_that_could_overflow_are_refused():
    config = CONFIGS["even"]
    weights = random_weights(config, 12)
    weights.check(config)
    first = weights.layers[0]
    replace = dataclasses.replace
    negative = replace(weights.head, multiplier=-weights.head.multiplier)
    floats = replace(weights.embed, weight=weights.embed.weight.float())
    full = torch.full_like(first.qkv.bias, 2**31 - 1 - 127 * 2047)
    wrong = {
        r"the sums of layers.0.qkv": changed(weights, qkv=replace(first.qkv, bias=full)),
        r"the products of layers.0's queries and keys": changed(weights, qkv=replace(first.qkv, limit=32767)),
        r"layers.0.fc1.shift must be from 1 to 62, got 63": changed(weights, fc1=replace(first.fc1, shift=63)),
        r"layers.0.fc1 must have a table": changed(weights, fc1=replace(first.fc1, table=None)),
        r"layers.0.norm2.epsilon must be from 1": changed(weights, norm2=replace(first.norm2, epsilon=0)),
        r"layers.0.attention.shift must be from 0": changed(weights, attention=replace(first.attention, shift=31)),
        r"head.multiplier must be from 0": replace(weights, head=negative),
        r"the sizes in slots": replace(weights, slots=weights.slots * 0 + 2**23 + 1),
        r"mask must be torch.int32 \[16\], got torch.int32 \[15\]": replace(weights, mask=weights.mask[1:]),
        r"embed.weight must be torch.int8": replace(weights, embed=floats),
    }  # fmt: skip
    for message, bad in wrong.items():
        with pytest.raises(ValueError, match=message):
            IntegerEntropy(config, bad)


def test_files_hold_integers_and_are_checked(tmp_path):
    config = CONFIGS["odd"]
    weights = random_weights(config, 13)
    path = weights.save(tmp_path)
    assert path == tmp_path / FILE and [file.name for file in tmp_path.iterdir()] == [FILE]
    again = Weights.load(tmp_path, config)
    assert again.tensors().keys() == weights.tensors().keys()
    for name, tensor in weights.tensors().items():
        assert not tensor.is_floating_point() and torch.equal(again.tensors()[name], tensor)
    with pytest.raises(UserError, match=r"no integers of this model .*layers.1.norm1.gain"):
        Weights.load(tmp_path, dataclasses.replace(config, depth=2))
    with pytest.raises(UserError, match=r"no integers of this model .*levels must be"):
        Weights.load(tmp_path, dataclasses.replace(config, lambdas=(0.1, 0.2)))
    changed(weights, attention=Attention(99, 1, 1, 1)).save(tmp_path)
    with pytest.raises(UserError, match=f"{FILE}: no integers of this model .*attention.shift must be from 0 to 30"):
        Weights.load(tmp_path, config)
    with pytest.raises(UserError, match="cannot read"):
        Weights.load(tmp_path / "none", config)


def model_with_statistics(seed):
    """A tiny codec whose transformer matters: its parameters are as large as those of trained ones."""
    torch.manual_seed(seed)
    model = models.create("m2t-tiny").eval()
    with torch.no_grad():
        for name, parameter in model.entropy.named_parameters():
            if "head" not in name:
                parameter.add_(torch.randn_like(parameter) * (0.2 if "norm" in name else 0.1))
        model.entropy.head.weight.mul_(10)
    return model


def drawn(model, seed):
    """Symbols that the model itself finds likely: what it predicts has to be right."""
    g = torch.Generator().manual_seed(seed)
    c = model.config
    tokens, known = torch.zeros(6, c.tokens, c.channels), torch.ones(6, c.tokens, dtype=torch.bool)
    with torch.no_grad():
        for step in range(len(c.groups)):
            means = model.entropy(tokens, model.quality(seed % 5), known)[:, :, 1, 0]
            noise = 0.7 * torch.randn(means.shape, generator=g)
            end, n = sum(c.groups[:step]), c.groups[step]
            tokens[:, end : end + n] = (means + noise)[:, end : end + n].round()
    return Latents(tokens, known, seed % 5)


def test_conversion_costs_few_bits():
    model = model_with_statistics(14)
    seen, unseen = [drawn(model, i) for i in range(5)], [drawn(model, i) for i in range(5, 10)]
    wrong = {}
    for bits in (7, 12):
        entropy = IntegerEntropy(model.config, convert(model, seen, bits=bits))
        floats, integers = (sum(parts) for parts in zip(*cost(model, entropy, unseen).values(), strict=True))
        assert integers / floats - 1 < 0.01
        sample = unseen[0]
        with torch.no_grad():
            means = model.entropy(sample.tokens, model.quality(sample.level), sample.known)[:, :, 1]
        wrong[bits] = (mixtures_of(entropy, sample).means / 256 - means).abs().mean()
    assert wrong[12] < wrong[7] / 2


def test_conversion_refuses():
    model = model_with_statistics(15)
    sample = [drawn(model, 0)]
    with pytest.raises(ValueError, match="bits must be from 6 to 16, got 5"):
        convert(model, sample, bits=5)
    with pytest.raises(ValueError, match="latents must not be empty"):
        convert(model, [])
    with pytest.raises(ValueError, match=r"the products of layers.0's queries and keys"):
        convert(model, sample, bits=16)
    with pytest.raises(ValueError, match="there is no MT in integers"):
        convert(M2T(dataclasses.replace(model.config, bidirectional=True)), sample)


def test_command(tmp_path, capsys):
    models.save_pretrained(model_with_statistics(16), tmp_path)
    train = str(photos() / "train.tar")
    assert main([str(tmp_path), train, "--most", "4"]) == 0
    assert "together" in capsys.readouterr().out
    assert Weights.load(tmp_path, model_with_statistics(16).config)
    for arguments, message in (
        ([str(tmp_path), train, "--most", "2"], "expected at least 4 that can be read, got 2"),
        ([str(tmp_path), train, "--most", "4", "--bits", "40"], "bits must be from 6 to 16, got 40"),
        ([str(tmp_path), str(tmp_path / "none.tar")], "none.tar"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err

"""`vlkern train m2t`: what it writes, that it can be killed, that ranks agree, MT's masks, rates, bad options."""

import io
import json
import signal

import numpy as np
import pytest
import runs
import shards
import torch
from PIL import Image

from vlkern import models
from vlkern.cli import main
from vlkern.models import m2t
from vlkern.models.m2t import M2T
from vlkern.recipes.contrastive import Recipe
from vlkern.recipes.m2t import M2TTask, known_tokens
from vlkern.train.ranks import Ranks

STEPS = 4


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    """Blurred noise of several sizes, without captions."""
    members = {}
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 256, (6, 8, 3)).astype(np.uint8)
        out = io.BytesIO()
        Image.fromarray(pixels).resize((80 + 4 * i, 70 + i), Image.Resampling.BICUBIC).save(out, "PNG")
        members[f"{i}.png"] = out.getvalue()
    return shards.write(tmp_path_factory.mktemp("data") / "train.tar", members)


def options(shard, folder, *more):
    fixed = ["--preset", "m2t-tiny", "--data", shard, "--out", folder, "--device", "cpu", "--flip", "--log-every", 1]
    return [str(a) for a in ["train", "m2t", *fixed, *more]]


@pytest.fixture(scope="module")
def unbroken(shard, tmp_path_factory):
    return runs.undisturbed(
        lambda folder: options(shard, folder, "--steps", STEPS, "--shrink", 0.9), tmp_path_factory.mktemp
    )


def test_what_is_written(unbroken):
    folder = unbroken[1]
    model = models.load_pretrained(folder / "model")
    assert isinstance(model, M2T) and model.config == m2t.PRESETS["m2t-tiny"]
    records = runs.records(folder)
    assert len(records) == STEPS and all(0 < r["bpp"] < 8 and 10 < r["psnr"] < 60 for r in records)
    stored = json.loads((folder / "config.json").read_text())["options"]
    assert (stored["crop"], stored["shrink"], stored["batch"], stored["precision"]) == (64, 0.9, 2, "fp32")


def test_killed_and_resumed(shard, unbroken, tmp_path):
    """Dead by SIGKILL while files are written, it ends with the same bits: crops and noise are those of the step."""
    folder, said = tmp_path / "run", tmp_path / "said"
    words = options(shard, folder, "--steps", STEPS, "--shrink", 0.9, "--save-every", 1)
    (code,) = runs.wait(runs.start(words, said, event=20))
    assert code == -signal.SIGKILL, said.with_name("said.0").read_text()
    runs.run(["train", "m2t", "--out", folder, "--resume", "--log-every", 1], said)
    ours, theirs = runs.weights(folder), runs.weights(unbroken[1])
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def test_two_ranks_learn_what_one_learns(unbroken):
    ours, theirs = (runs.records(unbroken[world]) for world in (2, 1))
    for name in ("loss", "bpp", "psnr"):
        # Adam makes a whole step of a gradient that is mere rounding, as that of biases of keys.
        assert [r[name] for r in ours] == pytest.approx([r[name] for r in theirs], rel=1e-3)


def test_masked_transformer_on_two_ranks_with_fsdp(shard, tmp_path, monkeypatch):
    """MT learns what it learns on one rank, in this process."""
    monkeypatch.setitem(m2t.PRESETS, "mt-test", runs.MT)
    more = ["--preset", "mt-test", "--steps", 2]
    assert main(options(shard, tmp_path / "one", *more)) == 0
    said = runs.run(options(shard, tmp_path / "two", *more, "--parallel", "fsdp"), tmp_path / "said", world=2)
    assert " 8 pictures\n" in said and "tokens" not in said
    one, two = (runs.records(tmp_path / name) for name in ("one", "two"))
    assert models.load_pretrained(tmp_path / "two/model").config == runs.MT
    for name in ("loss", "grad_norm", "bpp", "psnr"):
        assert [r[name] for r in two] == pytest.approx([r[name] for r in one], rel=1e-3)


def test_masks():
    """Between 5 and 99 percent of a tile, any token alike, and always at least one."""
    generator = torch.Generator().manual_seed(0)
    known = known_tokens(torch.rand(4000, generator=generator), torch.rand(4000, 64, generator=generator))
    masked = (~known).sum(1)
    assert masked.min() == 3 and masked.max() == 63  # 0.05 * 64 = 3.2 and 0.99 * 64 = 63.4
    assert abs(masked.double().mean() / 64 - 0.52) < 0.02
    assert ((~known).double().mean(0) - 0.52).abs().max() < 0.04
    assert not known_tokens(torch.zeros(1), torch.rand(1, 4)).all()


def task(model, steps=1000):
    recipe = Recipe(batch=2, rate=1e-3, weight_decay=1e-4, betas=(0.9, 0.99), clip=5.0, warm_up=100)
    ranks = Ranks(0, 1, torch.device("cpu"))
    return M2TTask(model, recipe, steps, ranks, None, seed=0, workers=0, flip=False)


def test_rates():
    made = task(M2T(m2t.PRESETS["m2t-tiny"]))
    rates = [made.rate(step) for step in (0, 49, 99, 500, 750, 999)]
    assert rates == pytest.approx([1e-5, 5e-4, 1e-3, 1e-3, 5e-4, 2e-5])
    groups = made.optimizer().param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(made.model.parameters()))
    for group in groups:
        assert group["weight_decay"] * group["multiple"] in (0, pytest.approx(0.1))
    of = {id(p): group for group in groups for p in group["params"]}
    model = made.model
    multiples = [of[id(p)]["multiple"] for p in (model.log_gain, model.entropy.mask, next(model.encoder.parameters()))]
    assert multiples == [2.0, 1.0, 0.3] and of[id(model.log_gain)]["weight_decay"] == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--crop", "72"], "--crop: expected a multiple of 16, got 72"),
        (["--crop", "128"], "--data, --crop 128: "),
        (["--shrink", "2"], "argument --shrink: must be above 0 and at most 1, got 2"),
        (["--precision", "bf16"], "--precision bf16: latents must not be rounded; expected fp32"),
        (["--preset", "vae-tiny"], "--preset: expected one of m2t-base, "),
        (["--batch", "9"], "--batch 9: there are only 8 pairs"),
    ],
)
def test_bad_options(more, message, shard, tmp_path, capfd):
    with pytest.raises(SystemExit, match="2"):
        main(options(shard, tmp_path / "run", "--steps", 1, *more))
    said = capfd.readouterr().err
    assert message in said and "Traceback" not in said
    assert not (tmp_path / "run").exists()

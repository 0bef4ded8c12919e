"""`vlkern train navit`: what it writes, that it can be killed, that ranks agree, and what it says of bad options."""

import json
import os
import signal

import pytest
import runs
import torch

from vlkern import data, models
from vlkern.cli import main
from vlkern.data.dropping import Beta, ByLength, BySeen, Constant
from vlkern.errors import UserError
from vlkern.models import navit
from vlkern.models.navit import Navit
from vlkern.train.navit import dropping_of

STEPS = 6
COUNT = 24


@pytest.fixture(autouse=True)
def _preset(monkeypatch):
    monkeypatch.setitem(navit.PRESETS, "navit-test", runs.NAVIT)


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    return runs.drawings(tmp_path_factory.mktemp("data") / "train.tar", COUNT)


def options(shard, folder, *more):
    fixed = [
        "--preset", "navit-test", "--data", shard, "--out", folder, "--batch", 8, "--precision", "fp32", "--device",
        "cpu", "--resolution", 8, 24, "--drop", "beta:0.3:0.6",
    ]  # fmt: skip
    return [str(a) for a in ["train", "navit", *fixed, *more]]


def steady(shard, folder):
    return options(
        shard, folder, "--steps", STEPS, "--save-every", 1, "--log-every", 1, "--keep", 2, "--augment", "--lr", 0.01
    )


@pytest.fixture(scope="module")
def unbroken(shard, tmp_path_factory):
    return runs.undisturbed(lambda folder: steady(shard, folder), tmp_path_factory.mktemp)


def test_model_and_tokenizer_are_what_the_others_read(shard, unbroken):
    folder = unbroken[1]
    model = models.load_pretrained(folder / "model")
    assert isinstance(model, Navit) and model.config == runs.NAVIT
    tokenizer = data.load_tokenizer(folder / "model", runs.NAVIT.text.length)
    texts = data.pack_texts(tokenizer(["colour 3"]), tokenizer.end)
    assert model.encode_text(*texts).shape == (1, 24)
    records = runs.records(folder)
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    assert records[-1]["loss"] < records[0]["loss"]
    stored = json.loads((folder / "config.json").read_text())["options"]
    assert (stored["resolution"], stored["sampling"], stored["sample"]) == ([8.0, 24.0], "-0.5", "side")


@pytest.mark.parametrize("event", [9, 23])
def test_killed_and_resumed(event, shard, unbroken, tmp_path):
    """Dead by SIGKILL while files are written, it ends with the same bits and the same log."""
    folder, said = tmp_path / "run", tmp_path / "said"
    (code,) = runs.wait(runs.start(steady(shard, folder), said, event=event))
    assert code == -signal.SIGKILL, said.with_name("said.0").read_text()
    assert not (folder / "model").exists() and (folder / "config.json").exists()
    runs.run(["train", "navit", "--out", folder, "--resume", "--save-every", 1, "--log-every", 1], said)
    ours, theirs = runs.weights(folder), runs.weights(unbroken[1])
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    for name in ("step", "loss", "lr", "grad_norm", "scale", "bias"):
        assert [r[name] for r in runs.records(folder)] == [r[name] for r in runs.records(unbroken[1])], name


def test_two_ranks_learn_what_one_learns(unbroken):
    ours, theirs = runs.weights(unbroken[2]), runs.weights(unbroken[1])
    for name in theirs:
        if not name.endswith(("k_proj.bias", "in_proj_bias")):  # their gradient is rounding
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4, msg=name)


def test_fsdp(shard, tmp_path):
    """Parameters cut over two ranks; what is written is the whole model."""
    folder = tmp_path / "run"
    runs.run([*options(shard, folder, "--steps", 1), "--parallel", "fsdp"], tmp_path / "said", world=2)
    assert models.load_pretrained(folder / "model").config == runs.NAVIT


def test_fine_tuning_keeps_what_is_frozen(shard, unbroken, tmp_path):
    start = ["train", "navit", "--from", str(unbroken[1] / "model"), "--data", str(shard), "--precision", "fp32"]
    more = ["--steps", "2", "--batch", "8", "--lit", "--resolution", "8", "32", "--sampling", "uniform"]
    assert main([*start, "--out", str(tmp_path / "run"), *more, "--sample", "area"]) == 0
    before, after = runs.weights(unbroken[1]), runs.weights(tmp_path / "run")
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if name.startswith("vision")}


def test_ways_to_drop():
    assert dropping_of("0", 64, 4, 1000) is None
    assert dropping_of("0.25", 64, 4, 1000) == Constant(0.25)
    assert dropping_of("beta:0.3:0.6", 64, 4, 1000) == Beta(0.3, 0.6)
    assert dropping_of("length:0.2:0.5", 64, 4, 1000) == ByLength(0.2, 0.5, 4, 64)
    assert dropping_of("seen:0.8:0.2", 64, 4, 1000) == BySeen(500, -100, 0.2, 0.8)
    assert dropping_of("seen:0.2:0.8", 64, 4, 1000) == BySeen(500, 100, 0.2, 0.8)


@pytest.mark.parametrize("how", ["half", "beta:0.5", "beta:0.5:x", "seen:1:2:3", "gamma:0.1:0.2", ":0.5", ""])
def test_no_way_to_drop(how):
    with pytest.raises(UserError, match=f"--drop {how}: expected RATE, beta:MEAN:MOST, length:LOW:HIGH or seen:FIRST"):
        dropping_of(how, 64, 4, 1000)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--resolution", "24", "8"], "--resolution 24 8: expected the smaller one first"),
        (["--resolution", "2", "8"], "--resolution 2 8: expected at least one patch of 4 pixels"),
        (["--resolution", "0", "8"], "argument --resolution: must be above 0, got 0"),
        (["--sampling", "gaussian"], "--sampling gaussian: expected `uniform` or a number"),
        (["--drop", "1"], "--drop 1: rate must be at least 0 and below 1, got 1.0"),
        (["--drop", "beta:0.6:0.3"], "--drop beta:0.6:0.3: rates must be 0 < mean < most < 1"),
        (["--preset", "siglip-tiny"], "--preset siglip-tiny: expected both towers of a NaViT, got Siglip"),
        (["--preset", "navit-huge"], "--preset: name must be one of"),
        (["--batch", "25"], "--batch 25: there are only 24 pairs"),
    ],
)
def test_bad_options(more, message, shard, tmp_path, capfd):
    with pytest.raises(SystemExit) as end:
        main(options(shard, tmp_path / "run", *more, "--steps", 1))
    err = capfd.readouterr().err
    assert end.value.code == 2 and message in err and "Traceback" not in err
    assert not os.path.exists(tmp_path / "run" / "config.json")


def test_runs_of_other_recipes(unbroken, capfd):
    with pytest.raises(SystemExit):
        main(["train", "siglip", "--out", str(unbroken[1]), "--resume"])
    assert "config.json is not of a run of `vlkern train siglip`" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "navit", "--out", str(unbroken[1]), "--resume", "--drop", "0"])
    assert "--drop 0: the run began with beta:0.3:0.6" in capfd.readouterr().err

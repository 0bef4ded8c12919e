"""`vlkern train maskgit`: what it writes, that ranks agree and runs resume, pictures and figures, bad options."""

import json

import pytest
import runs
import torch

from vlkern import data, models
from vlkern.cli import main
from vlkern.models import maskgit
from vlkern.models.fsq_autoencoder import FsqAutoencoder, FsqConfig
from vlkern.models.maskgit import MaskGit

STEPS = 6


@pytest.fixture(autouse=True)
def _presets(monkeypatch):
    monkeypatch.setitem(maskgit.PRESETS, "maskgit-test", runs.MASKGIT)


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    return runs.classes(tmp_path_factory.mktemp("data") / "train.tar", 12)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("fsq")
    models.save_pretrained(FsqAutoencoder(FsqConfig((4, 3), 8, 8, runs.CONVOLUTIONS)), folder)
    return folder


def options(shard, autoencoder, folder, *more):
    fixed = [
        "--preset", "maskgit-test", "--autoencoder", autoencoder, "--data", shard, "--out", folder, "--batch", 6,
        "--lr", 0.01, "--precision", "fp32", "--device", "cpu", "--log-every", 1, "--flip",
    ]  # fmt: skip
    return [str(a) for a in ["train", "maskgit", *fixed, *more]]


@pytest.fixture(scope="module")
def unbroken(shard, autoencoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    runs.run(options(shard, autoencoder, folder, "--steps", STEPS), folder.with_name("said"))
    return folder


def test_model_learns_and_is_whole(unbroken):
    model = models.load_pretrained(unbroken / "model")
    assert isinstance(model, MaskGit)
    c = model.config
    assert (c.tokens, c.codes, c.classes, c.image_size, c.width) == (16, 12, 3, 8, runs.MASKGIT.width)
    losses = [record["loss"] for record in runs.records(unbroken)]
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.3
    assert data.Classes.load(unbroken / "model").names == ("animals", "food", "plants")
    assert isinstance(models.load_pretrained(unbroken / "model" / "autoencoder"), FsqAutoencoder)


def test_two_ranks_and_a_resumed_run_learn_the_same(shard, autoencoder, unbroken, tmp_path):
    folder = tmp_path / "run"
    ranks = runs.start(
        options(shard, autoencoder, folder, "--steps", STEPS, "--save-every", 1), tmp_path / "said", event=20
    )
    assert runs.wait(ranks) != [0]
    runs.run(["train", "maskgit", "--out", folder, "--resume"], tmp_path / "again", world=2)
    runs.same_weights(folder, unbroken, 1e-4)


def test_pictures_and_figures(shard, unbroken, tmp_path, capsys):
    arguments = ["--model", str(unbroken / "model"), "--device", "cpu"]
    grids = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    for grid, more in zip(grids, ([], [], ["--guidance", "3", "--steps", "3"]), strict=True):
        words = ["generate", *arguments, "--out", str(grid), "--count", "3", "--seed", "1", "--class", "food", *more]
        assert main(words) == 0
    a, b, c = (grid.read_bytes() for grid in grids)
    assert a == b != c
    assert main(["eval", "pictures", *arguments, "--data", str(shard), "--out", str(tmp_path / "report")]) == 0
    results = json.loads((tmp_path / "report/results.json").read_text())
    bits = [value for name, value in results.items() if name.startswith("bits a token")]
    assert len(bits) == 2 and all(0 < value < 4 for value in bits)
    capsys.readouterr()
    for more, message in (
        (["--class", "foo"], "class 'foo' is unknown (did you mean 'food'?)"),
        (["--prompt", "a cat"], "--prompt: a MaskGIT has no use for it"),
        (["--guidance", "-1"], "--guidance must be at least 0, got -1"),
    ):
        assert message in runs.refusal(["generate", *arguments, "--out", grids[0], *more], capsys)


def test_bad_options(shard, autoencoder, unbroken, tmp_path, capsys):
    other = tmp_path / "other"
    models.save_pretrained(FsqAutoencoder(FsqConfig((4, 3), 16, 8, runs.CONVOLUTIONS)), other)
    words = options(shard, autoencoder, tmp_path / "run", "--steps", 1)
    begun = [*words[:2], *words[4:], "--from", str(unbroken / "model")]
    for arguments, message in (
        ([*words, "--autoencoder", str(unbroken / "model")], "expected a FsqAutoencoder, got MaskGit"),
        ([*words, "--preset", "maskgit-huge"], "--preset: expected one of maskgit-tiny"),
        ([*begun, "--autoencoder", str(other)], "expected 16 tokens out of 12 codes of pictures of 8 pixels, got 64"),
    ):
        assert message in runs.refusal(arguments, capsys)

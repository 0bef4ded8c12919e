"""`vlkern train jet`: what it writes, that it resumes, that ranks and invertible training agree, pictures."""

import json

import pytest
import runs
import torch

from vlkern import models
from vlkern.cli import main
from vlkern.models import jet
from vlkern.models.jet import Jet

STEPS = 4


@pytest.fixture(autouse=True)
def _preset(monkeypatch):
    monkeypatch.setitem(jet.PRESETS, "jet-test", runs.JET)


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    return runs.shard(tmp_path_factory.mktemp("data") / "train.tar", 12)


def options(shard, folder, *more):
    fixed = [
        "--preset", "jet-test", "--data", shard, "--out", folder, "--batch", 4, "--precision", "fp32", "--device",
        "cpu", "--log-every", 1, "--flip", "--lr", 0.01,
    ]  # fmt: skip
    return [str(a) for a in ["train", "jet", *fixed, *more]]


@pytest.fixture(scope="module")
def unbroken(shard, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    runs.run(options(shard, folder, "--steps", STEPS), folder.with_name("said"))
    return folder


def test_model_learns_and_is_written(unbroken):
    model = models.load_pretrained(unbroken / "model")
    assert isinstance(model, Jet) and model.config == runs.JET
    losses = [r["loss"] for r in runs.records(unbroken)]
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.3


def test_stopped_and_resumed(shard, unbroken, tmp_path, capsys):
    """Dead by SIGKILL behind the second step, it ends with the same bits."""
    folder = tmp_path / "run"
    ranks = runs.start(options(shard, folder, "--steps", STEPS, "--save-every", 1), tmp_path / "said", event=20)
    assert runs.wait(ranks) != [0]
    runs.run(["train", "jet", "--out", folder, "--resume"], tmp_path / "again")
    ours, theirs = runs.weights(folder), runs.weights(unbroken)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def test_two_ranks_without_activations_learn_what_one_learns_with_them(shard, unbroken, tmp_path):
    folder = tmp_path / "run"
    runs.run(options(shard, folder, "--steps", STEPS, "--invertible"), tmp_path / "said", world=2)
    assert models.load_pretrained(folder / "model").config.invertible
    ours, theirs = runs.weights(folder), runs.weights(unbroken)
    for name, tensor in theirs.items():
        # Key biases change nothing in a softmax: their gradient is rounding, and Adam makes steps of it.
        if not name.endswith("k_proj.bias"):
            assert torch.allclose(ours[name].float(), tensor.float(), atol=1e-4), name


def test_pictures_and_figures(shard, unbroken, tmp_path, capsys):
    arguments = ["--model", str(unbroken / "model"), "--device", "cpu"]
    grids = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    for grid, more in zip(grids, ([], [], ["--temperature", "0.5"]), strict=True):
        words = ["generate", *arguments, "--out", str(grid), "--count", "3", "--seed", "1", *more]
        assert main(words) == 0
    a, b, c = (grid.read_bytes() for grid in grids)
    assert a == b != c
    assert main(["eval", "pictures", *arguments, "--data", str(shard), "--out", str(tmp_path / "report")]) == 0
    results = json.loads((tmp_path / "report/results.json").read_text())
    assert 0 < results["bits_per_subpixel"] < 9
    assert 0 < results["largest error forth and back, float32"] < 1e-4
    assert set(results["lossless_files"]) == {"PNG", "lossless WebP"}
    assert "lossless WebP" in capsys.readouterr().out
    said = runs.refusal(["generate", *arguments, "--out", grids[0], "--class", "cats"], capsys)
    assert "--class: a Jet has no use for it" in said


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--invertible", "--parallel", "fsdp"], "--invertible: needs whole models on every rank"),
        (["--preset", "jet-huge"], "--preset: expected one of jet-tiny"),
        (["--batch", "13"], "--batch 13: there are only 12 pairs"),
    ],
)
def test_bad_options(more, message, shard, tmp_path, capsys):
    assert message in runs.refusal(options(shard, tmp_path / "run", "--steps", 1, *more), capsys)

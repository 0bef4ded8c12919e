"""`vlkern train siglip --naflex`: what it writes, that it can be killed, that ranks agree, and how it refuses."""

import json
import re
import signal

import pytest
import runs
import torch

from vlkern import data, models
from vlkern.cli import main
from vlkern.models.naflex import Naflex, NaflexConfig, NaflexVisionConfig
from vlkern.models.siglip import Siglip, SiglipConfig, TextConfig, VisionConfig

STEPS, COUNT = 6, 24
TEXT = TextConfig(16, 1, 2, 32, 300, 8)
CONFIG = NaflexConfig(NaflexVisionConfig(24, 2, 3, 48, patch=4, side=4), TEXT)


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    return runs.drawings(tmp_path_factory.mktemp("data") / "train.tar", COUNT)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The model with which runs begin: no preset is so small."""
    folder = tmp_path_factory.mktemp("start")
    torch.manual_seed(0)
    models.save_pretrained(Naflex(CONFIG), folder)
    return folder


def options(shard, folder, *more):
    fixed = ["--tokenizer", "bytes", "--batch", 8, "--precision", "fp32", "--device", "cpu"]
    return [str(a) for a in ["train", "siglip", "--data", shard, "--out", folder, *fixed, *more]]


def steady(shard, start, folder):
    return options(
        shard, folder, "--from", start, "--steps", STEPS, "--save-every", 1, "--log-every", 1, "--keep", 2, "--augment",
        "--lr", 0.01, "--max-patches", 4, 9, 16,
    )  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(shard, start, tmp_path_factory):
    return runs.undisturbed(lambda folder: steady(shard, start, folder), tmp_path_factory.mktemp)


def test_model_and_tokenizer_are_what_the_others_read(unbroken):
    folder = unbroken[1]
    model = models.load_pretrained(folder / "model")
    assert isinstance(model, Naflex) and model.config == CONFIG
    assert data.load_tokenizer(folder / "model", TEXT.length).vocabulary == 258
    records = runs.records(folder)
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    assert records[-1]["loss"] < records[0]["loss"]
    assert json.loads((folder / "config.json").read_text())["options"]["max_patches"] == [4, 9, 16]


def test_killed_and_resumed(shard, start, unbroken, tmp_path):
    """Ends with the bits of the run that was not killed, wherever it was: here in the midst of checkpoints."""
    folder, said = tmp_path / "run", tmp_path / "said"
    for event in (25, 40, 0):
        arguments = steady(shard, start, folder) + ["--resume"] * (folder / "config.json").exists()
        (code,) = runs.wait(runs.start(arguments, said, event=event))
        assert code == (-signal.SIGKILL if event else 0), said.with_name("said.0").read_text()
    assert "after step" in said.with_name("said.0").read_text()
    ours, theirs = runs.weights(folder), runs.weights(unbroken[1])
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert [r["loss"] for r in runs.records(folder)] == [r["loss"] for r in runs.records(unbroken[1])]


def test_two_ranks_learn_what_one_learns(unbroken):
    for one, two in zip(*(runs.records(unbroken[world]) for world in (1, 2)), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)


def test_a_model_of_fixed_size_becomes_one(shard, tmp_path, capfd):
    torch.manual_seed(0)
    fixed = Siglip(SiglipConfig(VisionConfig(24, 1, 3, 48, (8, 16), 4), TEXT))
    models.save_pretrained(fixed, tmp_path / "fixed")
    begin = ["--from", tmp_path / "fixed", "--steps", 1, "--lr", 1e-9, "--weight-decay", 0]
    assert main(options(shard, tmp_path / "run", *begin, "--naflex")) == 0
    tuned = models.load_pretrained(tmp_path / "run/model")
    assert tuned.config.vision == NaflexVisionConfig(24, 1, 3, 48, patch=4, side=4)
    assert json.loads((tmp_path / "run/config.json").read_text())["options"]["max_patches"] == [16]
    for name, before in fixed.state_dict().items():
        if "embeddings" not in name:
            torch.testing.assert_close(tuned.state_dict()[name], before, rtol=0, atol=1e-7)
    again = options(shard, tmp_path / "run", "--resume", "--max-patches", 9)
    with pytest.raises(SystemExit):
        main(again)
    assert "--max-patches 9: the run began with 16" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (["--preset", "naflex-tiny", "--image-size", 32], "--preset: naflex-tiny has no --image-size"),
        (["--preset", "siglip-tiny", "--max-patches", 9], "--max-patches: only for models .*, see --naflex"),
        (["--naflex", "--max-patches", 0], "argument --max-patches: must be from 1"),
        (["--preset", "navit-small"], "--preset navit-small: expected both towers of a SigLIP, got Navit"),
    ],
)
def test_bad_options(more, part, shard, tmp_path, capfd):
    with pytest.raises(SystemExit) as end:
        main(options(shard, tmp_path / "run", *more))
    error = capfd.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    assert re.search(part, error), error


def test_from_a_naflex_model_with_a_size(shard, start, tmp_path, capfd):
    with pytest.raises(SystemExit):
        main(options(shard, tmp_path / "run", "--from", start, "--image-size", 32))
    assert "holds a model for pictures of any shape" in capfd.readouterr().err


def test_the_default_preset(shard, tmp_path, monkeypatch):
    """--naflex alone trains naflex-small."""
    seen = []
    monkeypatch.setattr("vlkern.train.siglip.models.create", lambda name: seen.append(name) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(options(shard, tmp_path / "run", "--naflex"))
    assert seen == ["naflex-small"]

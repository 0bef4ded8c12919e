"""`vlkern train fsq` and `vae`: what they write, that they can be killed, that ranks agree, bad options; pictures."""

import json
import math
import signal

import pytest
import runs
import torch
from PIL import Image

from vlkern import models
from vlkern.cli import main
from vlkern.models import fsq_autoencoder, vae
from vlkern.painting.reconstruction import decibels, side_by_side
from vlkern.recipes.autoencoders import psnr
from vlkern.recipes.fsq import Objective

STEPS = 4
CONFIGS = {"fsq": runs.FSQ, "vae": runs.VAE}


@pytest.fixture(autouse=True)
def _presets(monkeypatch):
    monkeypatch.setitem(fsq_autoencoder.PRESETS, "fsq-test", runs.FSQ)
    monkeypatch.setitem(vae.PRESETS, "vae-test", runs.VAE)


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    return runs.shard(tmp_path_factory.mktemp("data") / "train.tar", 12)


def options(name, shard, folder, *more):
    fixed = ["--preset", f"{name}-test", "--data", shard, "--out", folder, "--batch", 4, "--device", "cpu", "--flip"]
    return [str(a) for a in ["train", name, *fixed, "--precision", "fp32", "--log-every", 1, "--lr", 0.01, *more]]


@pytest.fixture(scope="module")
def unbroken(shard, tmp_path_factory):
    """Folders of runs that nobody kills: of the FSQ autoencoder on one rank and on two, of the VAE on one."""
    folders = {}
    for name, world in (("fsq", 1), ("fsq", 2), ("vae", 1)):
        folder = tmp_path_factory.mktemp(f"{name}{world}") / "run"
        runs.run(options(name, shard, folder, "--steps", STEPS), folder.with_name("said"), world=world)
        folders[name, world] = folder
    return folders


@pytest.mark.parametrize("name", ["fsq", "vae"])
def test_what_is_written(name, unbroken):
    folder = unbroken[name, 1]
    model = models.load_pretrained(folder / "model")
    assert model.config == CONFIGS[name]
    records = runs.records(folder)
    assert records[-1]["loss"] < records[0]["loss"]
    last = records[-1]
    if name == "fsq":
        assert last["psnr"] == pytest.approx(psnr(last["loss"])) and last["codes_used"] * 12 in range(1, 13)
    else:
        assert json.loads((folder / "config.json").read_text())["options"]["beta"] == 0.01
        squared = 4 / 10 ** (last["psnr"] / 10)
        assert last["loss"] == pytest.approx(squared / 2 + 0.01 * last["kl"] / (3 * 8 * 8))


def test_killed_and_resumed(shard, unbroken, tmp_path):
    """Dead by SIGKILL while files are written, a VAE ends with the same bits: its noise is that of the step."""
    folder, said = tmp_path / "run", tmp_path / "said"
    words = options("vae", shard, folder, "--steps", STEPS, "--save-every", 1)
    (code,) = runs.wait(runs.start(words, said, event=20))
    assert code == -signal.SIGKILL, said.with_name("said.0").read_text()
    runs.run(["train", "vae", "--out", folder, "--resume", "--log-every", 1], said)
    ours, theirs = runs.weights(folder), runs.weights(unbroken["vae", 1])
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def test_two_ranks_learn_what_one_learns(unbroken):
    ours, theirs = (runs.weights(unbroken["fsq", world]) for world in (2, 1))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4, msg=name)
    used = [[record["codes_used"] for record in runs.records(unbroken["fsq", world])] for world in (1, 2)]
    assert used[0] == used[1]


def test_objective():
    model = models.create("fsq-test")
    pixels = torch.rand(3, 3, 8, 8) * 2 - 1
    objective = Objective(model)
    loss = objective(pixels)
    reconstruction, indices = model(pixels)
    torch.testing.assert_close(loss, torch.nn.functional.mse_loss(reconstruction, pixels))
    torch.testing.assert_close(objective.latest[1:], torch.bincount(indices.flatten(), minlength=12).float())


def test_signal_to_noise_and_sheet():
    a = torch.full((20, 3, 4, 4), 100, dtype=torch.uint8)
    b = a + 10
    assert decibels(a, b) == pytest.approx(20 * math.log10(255 / 10), abs=1e-4)
    assert decibels(a, a) == 99
    shown = side_by_side(a, b)[:, 0, 0, 0].tolist()  # whole rows only, so four pictures are left out
    assert shown == 2 * (8 * [100] + 8 * [110])
    assert side_by_side(a[:3], b[:3])[:, 0, 0, 0].tolist() == 3 * [100] + 3 * [110]


@pytest.mark.parametrize("name", ["fsq", "vae"])
def test_pictures_and_figures(name, shard, unbroken, tmp_path):
    arguments = ["--model", str(unbroken[name, 1] / "model"), "--device", "cpu"]
    Image.new("RGB", (20, 30), (200, 30, 90)).save(tmp_path / "in.png")
    sheets = []
    for number, more in enumerate(
        (["--seed", "1"], ["--seed", "1"], ["--seed", "2"], ["--image", tmp_path / "in.png"])
    ):
        sheet = tmp_path / f"{number}.png"
        assert main([*map(str, ["generate", *arguments, "--out", sheet, "--count", "2", *more])]) == 0
        sheets.append(sheet.read_bytes())
    assert sheets[0] == sheets[1] and sheets[2] != sheets[0] != sheets[3]
    assert main(["eval", "pictures", *arguments, "--data", str(shard), "--out", str(tmp_path / "report")]) == 0
    results = json.loads((tmp_path / "report/results.json").read_text())
    assert 0 < results["PSNR, dB"] < 30 and results["bits_per_subpixel"] is None
    if name == "fsq":
        assert 1 < results["perplexity of the codes"] <= 0.12 * results["codes used at least once, % of 12"]


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("fsq", ["--preset", "vae-test"], "--preset: expected one of fsq-tiny, "),
        ("vae", ["--beta", "-1"], "argument --beta: must be at least 0, got -1"),
        ("vae", ["--batch", "13"], "--batch 13: there are only 12 pairs"),
    ],
)
def test_bad_options(name, more, message, shard, tmp_path, capfd):
    assert message in runs.refusal(options(name, shard, tmp_path / "run", *more, "--steps", 1), capfd)
    assert not (tmp_path / "run").exists()


def test_models_of_another_kind(shard, unbroken, tmp_path, capfd):
    start = ["train", "vae", "--data", str(shard), "--out", str(tmp_path / "run"), "--from"]
    model = unbroken["fsq", 1] / "model"
    assert "expected a Vae, got FsqAutoencoder" in runs.refusal([*start, model], capfd)
    said = runs.refusal(["generate", "--model", model, "--out", "a.png", "--steps", 3], capfd)
    assert "--steps: an FSQ autoencoder has no use for it" in said

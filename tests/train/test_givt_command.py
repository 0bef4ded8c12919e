"""`vlkern train givt`: what it writes, that ranks agree and runs resume, pictures and figures, bad options."""

import json
from dataclasses import replace

import pytest
import runs
import torch

from vlkern import data, models
from vlkern.cli import main
from vlkern.models import givt
from vlkern.models.givt import Givt
from vlkern.models.vae import Vae, VaeConfig

STEPS = 4
PRESETS = {"givt-test": runs.GIVT, "givt-masked-test": replace(runs.GIVT, style="masked")}
AUTOENCODER = VaeConfig(2, 16, (1, 2), network=runs.CONVOLUTIONS)


@pytest.fixture(autouse=True)
def _presets(monkeypatch):
    for name, config in PRESETS.items():
        monkeypatch.setitem(givt.PRESETS, name, config)


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    return runs.classes(tmp_path_factory.mktemp("data") / "train.tar", 12)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    models.save_pretrained(Vae(AUTOENCODER), folder)
    return folder


def options(shard, autoencoder, folder, *more, preset="givt-masked-test"):
    fixed = [
        "--preset", preset, "--autoencoder", autoencoder, "--data", shard, "--out", folder, "--batch", 6, "--lr", 0.01,
        "--precision", "fp32", "--device", "cpu", "--log-every", 1, "--flip",
    ]  # fmt: skip
    return [str(a) for a in ["train", "givt", *fixed, *more]]


@pytest.fixture(scope="module")
def unbroken(shard, autoencoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    runs.run(options(shard, autoencoder, folder, "--steps", STEPS), folder.with_name("said"))
    return folder


def test_model_learns_and_is_whole(unbroken):
    model = models.load_pretrained(unbroken / "model")
    assert isinstance(model, Givt)
    c = model.config
    assert (c.length, c.channels, c.labels, c.image_size, c.style) == (32, 4, 3, 16, "masked")
    losses = [record["loss"] for record in runs.records(unbroken)]
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.3
    assert data.Classes.load(unbroken / "model").names == ("animals", "food", "plants")
    assert isinstance(models.load_pretrained(unbroken / "model" / "autoencoder"), Vae)


def test_two_ranks_and_a_resumed_run_learn_the_same(shard, autoencoder, unbroken, tmp_path):
    """How many tokens are hidden differs from rank to rank: the loss is the mean over those of the whole batch."""
    folder = tmp_path / "run"
    ranks = runs.start(
        options(shard, autoencoder, folder, "--steps", STEPS, "--save-every", 1), tmp_path / "said", event=20
    )
    assert runs.wait(ranks) != [0]
    runs.run(["train", "givt", "--out", folder, "--resume", "--parallel", "fsdp"], tmp_path / "again", world=2)
    runs.same_weights(folder, unbroken, 1e-4)


def test_pictures_and_figures(shard, autoencoder, unbroken, tmp_path, capsys):
    arguments = ["--model", str(unbroken / "model"), "--device", "cpu"]
    grids = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    for grid, more in zip(grids, ([], [], ["--guidance", "1", "--steps", "3"]), strict=True):
        words = ["generate", *arguments, "--out", str(grid), "--count", "3", "--seed", "1", "--class", "food", *more]
        assert main(words) == 0
    a, b, c = (grid.read_bytes() for grid in grids)
    assert a == b != c
    causal = tmp_path / "causal"
    assert main(options(shard, autoencoder, causal, "--steps", 1, preset="givt-test")) == 0
    for folder in (unbroken / "model", causal / "model"):
        words = ["eval", "pictures", "--model", str(folder), "--device", "cpu", "--data", str(shard)]
        assert main([*words, "--out", str(tmp_path / "report")]) == 0
        results = json.loads((tmp_path / "report/results.json").read_text())
        nats = [value for name, value in results.items() if name.startswith("nats a token")]
        assert len(nats) == 2 and all(0 < value < 20 for value in nats)
    assert " 12 pictures of 3 classes\n" in capsys.readouterr().out
    for more, message in (
        (["--class", "foo"], "class 'foo' is unknown (did you mean 'food'?)"),
        (["--prompt", "a cat"], "--prompt: a masked GIVT has no use for it"),
        (["--guidance", "-1"], "--guidance must be at least 0, got -1"),
    ):
        assert message in runs.refusal(["generate", *arguments, "--out", grids[0], *more], capsys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--autoencoder": None}, "--autoencoder: expected a folder with a trained one, got none"),
        ({"--autoencoder": "/nothing"}, "--autoencoder: /nothing: no such file or directory"),
        ({"--preset": "givt-huge"}, "--preset: expected one of givt-tiny"),
        ({"--preset": "givt-uvim-512"}, "got one with an encoder of pixels"),
        ({"--class-key": "kind"}, "kind"),
    ],
)
def test_bad_options(change, message, shard, autoencoder, tmp_path, capsys):
    words = options(shard, autoencoder, tmp_path / "run", "--steps", 1)
    for option, value in change.items():
        if value is None:
            at = words.index(option)
            del words[at : at + 2]
        else:
            words += [option, value]
    assert message in runs.refusal(words, capsys)

"""`vlkern train jetformer`: what it writes, going on, two ranks, bad options; and the pictures of its models."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import runs
import torch
from PIL import Image

from vlkern import data, models
from vlkern.cli import main
from vlkern.models import jetformer
from vlkern.models.jetformer import JetFormer
from vlkern.models.patch_pca import PatchPcaConfig
from vlkern.recipes.jetformer import JetFormerTask
from vlkern.recipes.pictures import Chance
from vlkern.train.ranks import Ranks

CLASSES = replace(runs.JETFORMER, text_length=1, repeats=2, tied=True, pca=PatchPcaConfig((4, 4), 48, whiten=False))


@pytest.fixture(autouse=True, scope="module")
def _presets():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(jetformer.PRESETS, "jetformer-test", runs.JETFORMER)
        patch.setitem(jetformer.PRESETS, "jetformer-test-classes", CLASSES)
        yield


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    """Captions, and classes in two halves."""
    members = {}
    for i in range(16):
        members[f"{i:04}.png"] = runs.shards.picture(color=(10 * i, 255 - 10 * i, 40 * i % 256), size=(16, 16))
        content = {"captions": [f"colour {i}"], "category": f"{'red' if i % 2 else 'blue_ish'}/{i}"}
        members[f"{i:04}.json"] = json.dumps(content).encode()
    return runs.shards.write(tmp_path_factory.mktemp("data") / "train.tar", members)


def options(shard, folder, *more, preset="jetformer-test"):
    fixed = ["--preset", preset, "--data", shard, "--out", folder, "--batch", 8, "--device", "cpu", "--lr", 0.01]
    return [str(a) for a in ["train", "jetformer", *fixed, "--precision", "fp32", "--log-every", 1, *more]]


def steady(shard, folder):
    return options(shard, folder, "--steps", 4, "--save-every", 2, "--picture-first", 0.5, "--flip", "--noise", 8)


@pytest.fixture(scope="module")
def unbroken(shard, tmp_path_factory):
    """Number of ranks -> folder of a run."""
    folders = {world: tmp_path_factory.mktemp(f"unbroken{world}") / "run" for world in (1, 2)}
    assert main(steady(shard, folders[1])) == 0
    runs.run(steady(shard, folders[2]), folders[2].with_name("said"), world=2)
    return folders


def test_what_it_writes(unbroken):
    folder = unbroken[1]
    model, words = models.load_pretrained(folder / "model"), data.load_tokenizer(folder / "model", 5)
    assert isinstance(model, JetFormer) and model.config == replace(runs.JETFORMER, vocabulary=words.vocabulary + 3)
    stored = json.loads((folder / "config.json").read_text())["options"]
    assert (stored["noise"], stored["picture_first"]) == (8.0, 0.5)
    records = runs.records(folder)
    assert [r["step"] for r in records] == [1, 2, 3, 4] and all(np.isfinite(r["loss"]) for r in records)


def test_resumed(unbroken, tmp_path):
    """From the checkpoint in the middle it ends with the same bits."""
    folder = tmp_path / "run"
    shutil.copytree(unbroken[1], folder)
    shutil.rmtree(folder / "model")
    latest = max((folder / "checkpoints").iterdir(), key=lambda path: path.name)
    shutil.rmtree(latest)
    assert main(["train", "jetformer", "--out", str(folder), "--resume", "--device", "cpu"]) == 0
    ours, theirs = runs.weights(folder), runs.weights(unbroken[1])
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def test_two_ranks_learn_what_one_learns(unbroken):
    ours, theirs = runs.weights(unbroken[2]), runs.weights(unbroken[1])
    for name in theirs:
        if not name.endswith("k_proj.bias"):  # its gradient is rounding
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4, msg=name)


def test_examples():
    """Noise on pixels fades, pictures that come first have none; a tenth of the other rows lose their text."""
    model = JetFormer(runs.JETFORMER)
    task = JetFormerTask(
        model, None, 100, Ranks(0, 1, torch.device("cpu")), None, None, seed=0, workers=0, flip=False,
        picture_first=0.25, noise=40.0,
    )  # fmt: skip
    count = 2000
    pixels, ids = torch.zeros(count, 3, 8, 8) + 1 / 255, torch.full((count, 5), 7)
    for progress, scale in ((0.0, 40.0), (0.5, 20.0), (1.0, 0.0)):
        chance = Chance(0, 3, count, task._ranks)
        noisy, words, noise, first = task.examples(pixels, ids, chance, progress)
        assert float(first.float().mean()) == pytest.approx(0.75, abs=0.03)
        assert float(noisy[first].std() * 127.5) == pytest.approx(
            (scale**2 + 1 / 6) ** 0.5, rel=0.3 if not scale else 0.01
        )
        level = noisy * 127.5 + 127.5
        assert float(level[~first].min()) > 127.99 and float(level[~first].max()) < 129.01
        if scale:
            assert float(level[first].std()) == pytest.approx(scale, rel=0.01)
        else:
            assert float(level.min()) > 127.99 and float(level.max()) < 129.01
        dropped = (words == runs.JETFORMER.bos + 2).all(1)
        assert float(dropped[first].float().mean()) == pytest.approx(0.1, abs=0.03) and not dropped[~first].any()
        assert (words[~dropped] == 7).all()
        assert 0.15 < float(noise.std()) < 0.2 and float(noise.flatten(1).std(1).max()) < 0.5


def test_pictures_of_captions(unbroken, shard, tmp_path, capsys):
    model, out = str(unbroken[1] / "model"), tmp_path / "a.png"
    paint = ["generate", "--model", model, "--out", str(out), "--count", "3", "--seed", "1"]
    assert main([*paint, "--prompt", "colour 3", "--guidance", "1.5", "--temperature", "0.9"]) == 0
    first = np.asarray(Image.open(out))
    assert main(paint) == 0  # of nothing in particular
    assert not np.array_equal(first, np.asarray(Image.open(out)))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([*paint, "--class", "red"])
    assert "--class: a JetFormer of captions has no use for it" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*paint, "--prompt", "colour", "--guidance", "-1"])
    assert "--guidance: must be at least 0, got -1" in capsys.readouterr().err

    report = ["eval", "pictures", "--model", model, "--data", str(shard), "--out", str(tmp_path / "report")]
    assert main(report) == 0
    figures = json.loads((tmp_path / "report" / "results.json").read_text())
    assert 0 < figures["bits_per_subpixel"] < 12 and 0 < figures["bits per sub-pixel, given the text"] < 12


def test_classes(shard, tmp_path, capsys):
    """Principal components are fitted to the pictures; a class is the text."""
    folder = tmp_path / "run"
    assert main(options(shard, folder, "--steps", 1, preset="jetformer-test-classes")) == 0
    model = models.load_pretrained(folder / "model")
    assert model.config.vocabulary == 2 + 3 and float(model.pca.explained_variance[0]) > 0.1
    assert data.Classes.load(folder / "model").names == ("blue ish", "red")
    out = tmp_path / "a.png"
    assert (
        main(["generate", "--model", str(folder / "model"), "--out", str(out), "--count", "2", "--class", "red"]) == 0
    )
    again = [
        "train",
        "jetformer",
        "--from",
        str(folder / "model"),
        "--data",
        str(shard),
        "--steps",
        "1",
        "--batch",
        "8",
    ]
    assert main([*again, "--out", str(tmp_path / "again"), "--device", "cpu"]) == 0
    assert torch.equal(runs.weights(tmp_path / "again")["pca.components"], runs.weights(folder)["pca.components"])


@pytest.mark.parametrize(
    ("more", "preset", "message"),
    [
        (
            ["--picture-first", "2"],
            "jetformer-test",
            "argument --picture-first: must be at least 0 and at most 1, got 2",
        ),
        (["--picture-first", "0.5"], "jetformer-test-classes", "--picture-first: only for models of captions, not of"),
        ([], "jetformer-huge", "--preset: expected one of"),
        (["--class-key", "kind"], "jetformer-test-classes", "kind"),
        (["--batch", "17"], "jetformer-test", "--batch 17: there are only 16 pairs"),
    ],
)
def test_bad_options(more, preset, message, shard, tmp_path, capfd):
    assert message in runs.refusal(options(shard, tmp_path / "run", *more, "--steps", 1, preset=preset), capfd)
    assert not (tmp_path / "run").exists()

"""`vlkern train paligemma`: it learns, survives being killed, ranks agree, and its folder serves eval and generate."""

import json
import signal

import pytest
import runs
import shards
import torch

from vlkern import data, models
from vlkern.cli import main
from vlkern.models import paligemma
from vlkern.models.paligemma import PaliGemma

STEPS = 6
COUNT = 24
COLOURS = {"red": (220, 0, 0), "green": (0, 160, 0), "blue": (0, 0, 220)}


@pytest.fixture(autouse=True)
def _preset(monkeypatch):
    monkeypatch.setitem(paligemma.PRESETS, "paligemma-test", runs.PALIGEMMA)


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    """Three colours, which are their classes."""
    members = {}
    for i in range(COUNT):
        name = list(COLOURS)[i % 3]
        size = (12 + i, 30)
        record = {"captions": [f"{name} thing"], "category": f"{name}/plain", "width": size[0], "height": size[1]}
        members[f"{i:04}.png"] = shards.picture(COLOURS[name], size=size)
        members[f"{i:04}.json"] = json.dumps(record).encode()
    return shards.write(tmp_path_factory.mktemp("data") / "train.tar", members)


def options(shard, folder, *more):
    fixed = [
        "--preset", "paligemma-test", "--data", shard, "--out", folder, "--batch", 8, "--precision", "fp32",
        "--device", "cpu",
    ]  # fmt: skip
    return [str(a) for a in ["train", "paligemma", *fixed, *more]]


def steady(shard, folder):
    return options(
        shard, folder, "--steps", STEPS, "--save-every", 1, "--log-every", 1, "--keep", 2, "--augment", "--lr", 0.01
    )


@pytest.fixture(scope="module")
def unbroken(shard, tmp_path_factory):
    """world -> folder of a run that nobody disturbs; two ranks with FSDP."""
    folders = {}
    for world in (1, 2):
        folders[world] = tmp_path_factory.mktemp(f"unbroken{world}") / "run"
        how = ["--parallel", "fsdp"] if world == 2 else []
        runs.run([*steady(shard, folders[world]), *how], folders[world].with_name("said"), world=world)
    return folders


def test_what_is_in_the_folder(unbroken):
    folder = unbroken[1]
    model = models.load_pretrained(folder / "model")
    words = data.load_vocabulary(folder / "model")
    assert isinstance(model, PaliGemma) and model.config.sampled_vocabulary == words.size > data.BytePieces.FIXED
    assert model.config.vision == runs.PALIGEMMA.vision
    records = runs.records(folder)
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    assert records[-1]["loss"] < records[0]["loss"] / 1.5
    stored = json.loads((folder / "config.json").read_text())
    assert stored["recipe"] == "paligemma" and stored["options"]["tasks"] == ["caption", "category", "detect"]
    assert stored["options"]["class_key"] == "category"


def test_killed_and_resumed(shard, unbroken, tmp_path):
    """Dead by SIGKILL while files are written, it ends with the same bits and the same log."""
    folder, said = tmp_path / "run", tmp_path / "said"
    (code,) = runs.wait(runs.start(steady(shard, folder), said, event=17))
    assert code == -signal.SIGKILL, said.with_name("said.0").read_text()
    assert not (folder / "model").exists() and (folder / "config.json").exists()
    runs.run(["train", "paligemma", "--out", folder, "--resume", "--save-every", 1, "--log-every", 1], said)
    ours, theirs = runs.weights(folder), runs.weights(unbroken[1])
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    for name in ("step", "loss", "lr", "grad_norm"):
        assert [r[name] for r in runs.records(folder)] == [r[name] for r in runs.records(unbroken[1])], name


def test_two_ranks_with_fsdp_learn_what_one_learns(unbroken):
    """Parameters, gradients and optimizer cut over two ranks: the same losses, to rounding."""
    for ours, theirs in zip(runs.records(unbroken[2]), runs.records(unbroken[1]), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    ours, theirs = runs.weights(unbroken[2]), runs.weights(unbroken[1])
    for name in theirs:
        if not name.endswith("k_proj.bias"):  # its gradient is rounding
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(("tower", "prefix"), [("image", "vision_tower."), ("text", "language_model.")])
def test_fine_tuning_keeps_what_is_frozen(tower, prefix, shard, unbroken, tmp_path):
    start = ["train", "paligemma", "--from", str(unbroken[1] / "model"), "--data", str(shard), "--precision", "fp32"]
    more = ["--steps", "2", "--batch", "8", "--freeze", tower, "--layer-decay", "0.5", "--tasks", "category"]
    assert main([*start, "--out", str(tmp_path / "run"), *more]) == 0
    before, after = runs.weights(unbroken[1]), runs.weights(tmp_path / "run")
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if name.startswith(prefix)}


def test_it_learns_from_pictures(shard, tmp_path, capsys):
    """After 30 short steps it names the colours, which no text tells it; eval and generate read what it left."""
    folder = tmp_path / "run"
    more = ["--steps", 30, "--lr", 0.01, "--tasks", "category"]
    assert main(options(shard, folder, *more)) == 0
    capsys.readouterr()
    model = str(folder / "model")
    assert main(["eval", "paligemma", "--model", model, "--data", str(shard), "--out", str(tmp_path / "eval")]) == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    category = results["category"]
    assert category["pictures"] == COUNT and category["classes"] == 3 and category["chance"] == pytest.approx(1 / 3)
    assert category["accuracy"] == category["mean_over_classes"] > 0.95, printed
    assert "class of 24 pictures" in printed and "33.3 %" in printed
    assert results["boxes"]["objects"] >= COUNT and results["caption"]["tokens"] > COUNT
    for name, colour in COLOURS.items():
        picture = tmp_path / f"{name}.png"
        picture.write_bytes(shards.picture(colour, size=(20, 20)))
        asked = ["generate", "--model", model, "--prompt", "answer en category", "--image", str(picture)]
        assert main(asked) == 0
        said = capsys.readouterr()
        assert said.out == f"{name}\n" and said.err.startswith("prefill ")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--preset", "siglip-tiny"], "--preset: expected one of"),
        (["--tasks", "caption", "count"], "argument --tasks: invalid choice: 'count'"),
        (
            ["--tasks", "category", "--class-key", "kind"],
            "--tasks category: no picture has a class (a string at 'kind'",
        ),
        (["--image-size", "4"], "--image-size: image_size must be at least one patch"),
        (["--batch", "25"], "--batch 25: there are only 24 pairs"),
        (["--tokenizer", "nowhere"], "nowhere: no such tokenizer"),
        (["--freeze", "image", "--freeze", "text"], "--freeze: one tower at most"),
    ],
)
def test_bad_options(more, message, shard, tmp_path, capfd):
    with pytest.raises(SystemExit) as end:
        main(options(shard, tmp_path / "run", *more, "--steps", 1))
    err = capfd.readouterr().err
    assert end.value.code == 2 and message in err and err.count("\n") == 1, err
    assert not (tmp_path / "run" / "config.json").exists()


def test_other_models_and_recipes(shard, unbroken, tmp_path, capfd):
    def fails(*arguments):
        with pytest.raises(SystemExit) as end:
            main([str(a) for a in arguments])
        err = capfd.readouterr().err
        assert end.value.code == 2 and err.count("\n") == 1, err
        return err

    assert "is not of a run of `vlkern train navit`" in fails("train", "navit", "--out", unbroken[1], "--resume")
    resumed = ["train", "paligemma", "--out", unbroken[1], "--resume"]
    assert "--tasks caption: the run began with caption category detect" in fails(*resumed, "--tasks", "caption")
    siglip = tmp_path / "siglip"
    models.save_pretrained(models.siglip.Siglip(runs.CONFIG), siglip)
    start = ["train", "paligemma", "--data", shard, "--out", tmp_path / "run", "--from", siglip]
    assert f"--from {siglip}: expected a PaliGemma, got Siglip" in fails(*start)
    start[-1] = unbroken[1] / "model"
    assert "the tokenizer must have" in fails(*start, "--batch", 8, "--steps", 1, "--tokenizer", "bytes")
    words = data.load_vocabulary(start[-1])
    # Hugging Face's tokenizer has an id for the placeholder, too.
    data.BytePieces([*words.merges, words.merges[0]]).save(tmp_path)
    once = ["--batch", "8", "--steps", "1", "--tasks", "caption", "--tokenizer", str(tmp_path / "pieces.json")]
    assert main([*map(str, start), *once]) == 0
    capfd.readouterr()
    asked = ["eval", "paligemma", "--data", shard, "--model"]
    assert f"--model {siglip}: expected a PaliGemma, got Siglip" in fails(*asked, siglip)
    assert "the tokenizer must have" in fails(*asked, start[-1], "--tokenizer", "bytes")

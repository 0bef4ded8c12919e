"""`vlkern train siglip` as a user meets it: what it writes, and what it says when something is wrong."""

import json
import re
import subprocess
import sys

import pytest
import runs
import shards
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vlkern import data, models
from vlkern.cli import main
from vlkern.models.siglip import PRESETS, Siglip


@pytest.fixture(autouse=True)
def _preset(monkeypatch):
    monkeypatch.setitem(PRESETS, "test", runs.CONFIG)


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    return runs.shard(tmp_path_factory.mktemp("data") / "train.tar", 24)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


def options(shard, folder, *more):
    fixed = [
        "--preset",
        "test",
        "--data",
        shard,
        "--out",
        folder,
        "--batch",
        8,
        "--precision",
        "fp32",
        "--device",
        "cpu",
    ]
    return [str(a) for a in ["train", "siglip", *fixed, *more]]


def fails(arguments, capfd, *parts):
    """One line on stderr, status 2."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    err = capfd.readouterr().err
    assert end.value.code == 2
    assert err.startswith("vlkern: error: ") and err.count("\n") == 1, err
    for part in parts:
        assert str(part) in err


def points(folder):
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    return {tag: [event.step for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def test_a_run_and_its_continuation(shard, folder, capfd):
    """What the folder of a run holds; a finished run can be asked to continue, and only writes its model again."""
    assert main(options(shard, folder, "--steps", 5, "--save-every", 2, "--keep", 1, "--log-every", 2)) == 0
    said = capfd.readouterr().out
    for part in ("24 pairs", "5 steps of 8 examples", "step 5/5  loss ", f"wrote     {folder}/model"):
        assert part in said
    assert [r["step"] for r in runs.records(folder)] == [1, 2, 4, 5]
    names = "step loss lr grad_norm scale bias examples_per_second seconds peak_memory"
    assert " ".join(runs.records(folder)[0]) == names
    assert runs.records(folder)[0]["scale"] == pytest.approx(25, rel=0.02)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-5"]
    assert set(points(folder)) == set(names.split()[1:]) and points(folder)["loss"] == [1, 2, 4, 5]
    config = json.loads((folder / "config.json").read_text())
    assert config["options"]["lr"] == 1e-3 and config["data"]["pairs"] == 24

    before = runs.weights(folder)
    (folder / "model" / "model.safetensors").unlink()
    assert main(["train", "siglip", "--out", str(folder), "--resume"]) == 0
    assert "after step 5 of 5" in capfd.readouterr().out
    after = runs.weights(folder)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [r["step"] for r in runs.records(folder)] == [1, 2, 4, 5]


def test_model_and_tokenizer_are_what_the_others_read(shard, folder):
    assert main(options(shard, folder, "--steps", 1)) == 0
    model = models.load_pretrained(folder / "model")
    assert model.config == runs.CONFIG
    tokenizer = data.load_tokenizer(folder / "model", runs.CONFIG.text.length)
    assert 258 < tokenizer.vocabulary <= runs.CONFIG.text.vocabulary
    model.encode_text(tokenizer(["colour 3"]))


def test_fine_tuning_starts_from_the_model_and_its_tokenizer(shard, folder, capfd):
    assert main(options(shard, folder, "--steps", 2)) == 0
    tuned = folder.with_name("tuned")
    more = ["--steps", "1", "--lr", "1e-9", "--weight-decay", "0", "--layer-decay", "0.5", "--batch", "8"]
    start = ["train", "siglip", "--data", str(shard), "--precision", "fp32", "--from", str(folder / "model")]
    assert main([*start, "--out", str(tuned), *more]) == 0
    before, after = runs.weights(folder), runs.weights(tuned)
    for name in before:
        torch.testing.assert_close(before[name], after[name], rtol=0, atol=1e-7)
    pairs = "byte_pairs.json"
    assert (tuned / "model" / pairs).read_bytes() == (folder / "model" / pairs).read_bytes()


@pytest.mark.parametrize("how", [["--freeze", "image"], ["--lit"], ["--freeze", "text"]])
def test_a_frozen_tower_stays(how, shard, folder):
    assert main(options(shard, folder, "--steps", 2, *how)) == 0
    torch.manual_seed(0)
    before, after = Siglip(runs.CONFIG).state_dict(), runs.weights(folder)
    same = {name for name in before if torch.equal(before[name], after[name])}
    frozen, other = ("text", "vision") if how[-1] == "text" else ("vision", "text")
    assert same == {name for name in before if name.startswith(frozen)}
    assert any(name.startswith(other) for name in before)


def test_without_tensorboard(shard, folder, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert main(options(shard, folder, "--steps", 1)) == 0
    assert "tensorboard is not installed (pip install 'vlkern[train]')" in capfd.readouterr().out
    assert not (folder / "tensorboard").exists()


def test_a_bar_on_a_terminal(shard, folder, capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    assert main(options(shard, folder, "--steps", 3)) == 0
    assert "3/3" in capfd.readouterr().out


def test_resume_refuses_what_would_be_another_run(shard, folder, capfd, tmp_path):
    assert main(options(shard, folder, "--steps", 2)) == 0
    capfd.readouterr()
    again = ["train", "siglip", "--out", str(folder), "--resume"]
    fails([*again, "--lr", "0.5"], capfd, "--lr 0.5: the run began with 0.001")
    fails([*again, "--steps", "9"], capfd, "--steps 9: the run began with 2")
    fails([*again, "--examples", "80"], capfd, "--steps 10: the run began with 2")
    other = runs.shard(tmp_path / "other.tar", 25)
    fails([*again, "--data", str(other)], capfd, "--data: not the pairs that the run began with")
    moved = tmp_path / "elsewhere" / shard.name
    moved.parent.mkdir()
    moved.write_bytes(shard.read_bytes())
    assert main([*again, "--data", str(moved), "--lr", "0.001"]) == 0


def test_damaged_checkpoint(shard, folder, capfd):
    assert main(options(shard, folder, "--steps", 2, "--save-every", 1)) == 0
    capfd.readouterr()
    part = folder / "checkpoints" / "step-2" / "__0_0.distcp"
    part.write_bytes(part.read_bytes()[:1000])
    again = ["train", "siglip", "--out", str(folder), "--resume"]
    fails(again, capfd, folder / "checkpoints" / "step-2", "damaged checkpoint", "remove it")
    part.unlink()
    part.with_name(".metadata").unlink()
    part.parent.rmdir()
    assert main(again) == 0
    assert "after step 1 of 2" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (["--resume"], ["--resume: nothing to resume in", "no config.json"]),
        (["--preset", "siglip-tny"], ["--preset", "siglip-tiny", "siglip-tny"]),
        (["--device", "cuda:77"], ["--device cuda:77"]),
        (["--device", "toaster"], ["--device toaster"]),
        (["--batch", "25"], ["--batch 25: there are only 24 pairs"]),
        (["--batch", "0"], ["argument --batch: must be"]),
        (["--lr", "nan"], ["argument --lr: must be above 0, got nan"]),
        (["--beta2", "1"], ["argument --beta2: must be at least 0"]),
        (["--steps", "5", "--examples", "5"], ["not allowed with argument"]),
        (["--freeze", "image", "--freeze", "text"], ["--freeze: one tower at most"]),
        (["--tokenizer", "/nowhere.json"], ["/nowhere.json"]),
        (["--data", "/nowhere.tar"], ["/nowhere.tar: no such shard"]),
        (["--from", "/nowhere", "--preset", "test"], ["not allowed with argument"]),
    ],
)
def test_bad_options(more, parts, shard, folder, capfd):
    """And leave no folder behind, nor those above it."""
    fails(options(shard, folder / "deeper", *more), capfd, *parts)
    assert not folder.exists()


def test_what_cannot_be_read_is_said_once(folder, tmp_path, capfd):
    """A sample without a caption when the index is made, a picture that is none when it is its turn."""
    good = runs.shard(tmp_path / "good.tar", 8)
    bad = shards.write(tmp_path / "bad.tar", {"a.png": b"no picture", "a.txt": b"text", "b.png": shards.picture()})
    assert main([*options(good, folder, "--steps", "4"), "--data", str(good), str(bad)]) == 0
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("left out")]
    assert len(lines) == 2 and all(str(bad) in line for line in lines)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_folder_of_something_else(text, folder, capfd):
    folder.mkdir()
    (folder / "config.json").write_text(text)
    fails(["train", "siglip", "--out", str(folder), "--resume"], capfd, "config.json")


def test_no_data(folder, capfd):
    fails(["train", "siglip", "--out", str(folder)], capfd, "--data")
    fails(["train", "siglip"], capfd, "--out")
    fails(["train"], capfd, "RECIPE")


def test_a_tokenizer_larger_than_the_vocabulary(shard, folder, capfd, tmp_path):
    merges = [(2 + i, 2 + j) for i in range(10) for j in range(10)]
    data.ByteTokenizer(8, merges).save(tmp_path)
    parts = ["--tokenizer", "358", "300"]
    folder.mkdir()
    fails(options(shard, folder, "--tokenizer", tmp_path / "byte_pairs.json"), capfd, *parts)
    assert [path.name for path in folder.iterdir()] == [".lock"]  # the folder was there before


def test_a_folder_that_is_not_empty(shard, folder, capfd):
    folder.mkdir()
    (folder / "notes.txt").touch()
    fails(options(shard, folder), capfd, f"--out {folder}: the folder is not empty (choose another)")


def test_a_folder_that_cannot_be(shard, folder, capfd):
    folder.touch()
    fails(options(shard, folder / "deeper"), capfd, f"--out {folder}/deeper: cannot write there (Not a directory)")


def test_one_run_at_a_time(shard, folder, capfd):
    assert main(options(shard, folder, "--steps", 1)) == 0
    capfd.readouterr()
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", hold, str(folder / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        fails(["train", "siglip", "--out", str(folder), "--resume"], capfd, "another process is training there")
        other.communicate(b"\n")
    assert main(["train", "siglip", "--out", str(folder), "--resume"]) == 0


def test_a_loss_that_is_not_finite(shard, folder, capfd):
    fails(
        options(shard, folder, "--steps", 50, "--lr", "1e30", "--save-every", 1), capfd,
        "a lower --lr", "step ",
    )  # fmt: skip
    checkpoints = [path.name for path in folder.glob("checkpoints/*")]
    assert all(re.fullmatch(r"step-\d+", name) for name in checkpoints) and len(checkpoints) < 3


def test_two_ranks_and_an_odd_batch(shard, folder, tmp_path):
    codes = runs.wait(runs.start(options(shard, folder, "--batch", 7), tmp_path / "said", world=2))
    said = [(tmp_path / f"said.{rank}").read_text() for rank in range(2)]
    assert codes == [2, 2], said
    assert "vlkern: error: --batch 7: must be a multiple of the 2 ranks" in said[0]
    assert "vlkern: error: rank 1: --batch 7" in said[1]


def test_a_full_disk_leaves_the_checkpoint_before(shard, folder, tmp_path):
    """No file may grow to the size of a checkpoint after the first steps: the one before stays, and resumes."""
    assert main(options(shard, folder, "--steps", 3, "--save-every", 2)) == 0
    for path in (folder / "checkpoints" / "step-3").iterdir():
        path.unlink()
    (folder / "checkpoints" / "step-3").rmdir()
    again = ["train", "siglip", "--out", folder, "--resume"]
    (code,) = runs.wait(runs.start(again, tmp_path / "said", largest=20_000))
    said = (tmp_path / "said.0").read_text()
    assert code == 2
    assert said.splitlines()[-1].startswith(f"vlkern: error: {folder}/checkpoints/step-3: cannot write this checkpoint")
    assert "the newest complete one is step-2" in said
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-2"]
    assert runs.wait(runs.start(again, tmp_path / "said")) == [0]

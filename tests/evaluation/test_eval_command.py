"""`vlkern eval siglip` against plain loops, and what it says when it cannot."""

import json
import os
import sys

import gallery
import pytest
import torch
from PIL import Image

from vlkern import cli
from vlkern.errors import UserError
from vlkern.evaluation import TEMPLATES, load_encoder, prompts
from vlkern.evaluation.tables import Table, cut


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return gallery.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    return gallery.shard(tmp_path_factory.mktemp("shard") / "test.tar")


def evaluate(model_folder, *arguments):
    return cli.main(["eval", "siglip", "--model", str(model_folder), "--batch", "5", *map(str, arguments)])


def results_of(out):
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def plain_recall(images, captions, k):
    """Text to image and image to text, by sorting; captions: a list for each picture."""
    owner = [i for i, texts in enumerate(captions) for _ in texts]
    similarity = images @ gallery.words(gallery.model(), [text for texts in captions for text in texts]).T
    by_image = [owner[j] for j in range(len(owner))]
    to_image = [by_image[j] in similarity[:, j].argsort(descending=True)[:k].tolist() for j in range(len(owner))]
    to_text = [i in [owner[j] for j in similarity[i].argsort(descending=True)[:k]] for i in range(len(captions))]
    return sum(to_image) / len(to_image), sum(to_text) / len(to_text)


def test_retrieval(model_folder, shard, tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    assert evaluate(model_folder, "--data", shard, "--out", out) == 0
    found = results_of(out)["retrieval"]
    captions = [record["captions"] for record in gallery.records(12)]
    assert (found["pictures"], found["texts"]) == (12, sum(map(len, captions)))
    images = gallery.vectors(gallery.model(), list(range(12)))
    for k in (1, 5, 10):
        to_image, to_text = plain_recall(images, captions, k)
        assert found["text_to_image"]["recall"][str(k)] == pytest.approx(to_image)
        assert found["image_to_text"]["recall"][str(k)] == pytest.approx(to_text)
        assert found["text_to_image"]["chance"][str(k)] == pytest.approx(k / 12)

    printed = capsys.readouterr().out
    assert "retrieval: 12 pictures, 24 texts" in printed and "T→I @10" in printed
    assert {file.name for file in out.iterdir()} == {"results.json", "results.md", "retrieval.png", "retrieval.svg"}
    assert f"{100 * found['text_to_image']['recall']['5']:.1f} %" in (out / "results.md").read_text(encoding="utf-8")
    with Image.open(out / "retrieval.png") as image:
        assert image.width > 500
    assert (out / "retrieval.svg").read_text().rstrip().endswith("</svg>")


def test_languages(model_folder, shard, tmp_path, capsys):
    assert evaluate(model_folder, "--data", shard, "--languages", "all", "--out", tmp_path) == 0
    found = results_of(tmp_path)
    assert "retrieval" not in found and list(found["languages"]) == ["de", "mi"]
    images = gallery.vectors(gallery.model(), list(range(12)))
    spoken = {
        "de": (list(range(12)), [[f"Name {i}"] for i in range(12)]),
        "mi": (list(range(1, 12, 2)), [[f"ingoa {i}", f"kupu {i}"] for i in range(1, 12, 2)]),
    }
    for language, (numbers, names) in spoken.items():
        result = found["languages"][language]
        assert (result["pictures"], result["texts"]) == (len(numbers), sum(map(len, names)))
        for k in (1, 5):
            to_image, to_text = plain_recall(images[numbers], names, k)
            assert result["text_to_image"]["recall"][str(k)] == pytest.approx(to_image)
            assert result["image_to_text"]["recall"][str(k)] == pytest.approx(to_text)
    assert "10" not in found["languages"]["mi"]["text_to_image"]["recall"]  # there are six
    assert (tmp_path / "languages.svg").exists()
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if line.startswith("mi ")).split()[1] == "6"
    assert next(line for line in lines if line.startswith("mi ")).split()[-1] == "-"
    assert any(line.startswith("mean ") for line in lines)


def plain_zero_shot(classes, templates, numbers):
    """The most similar class of each picture."""
    model = gallery.model()
    centres = []
    for names in classes.values():
        mean = gallery.words(model, [p for name in names for p in prompts(name, templates)]).mean(0)
        centres.append(mean / mean.norm())
    return [list(classes)[best] for best in (gallery.vectors(model, numbers) @ torch.stack(centres).T).argmax(1)]


def test_zero_shot_in_a_folder(model_folder, tmp_path, capsys):
    folder, out = gallery.folder(tmp_path / "pictures"), tmp_path / "out"
    assert evaluate(model_folder, "--images", folder, "--out", out) == 0
    found = results_of(out)["zero_shot"]
    answers = plain_zero_shot({c: (c,) for c in ("blue", "green", "red")}, TEMPLATES["clip_best"], list(range(12)))
    right = [record["category"] for record in gallery.records(12)]
    assert (found["pictures"], found["classes"], found["templates"]) == (12, 3, list(TEMPLATES["clip_best"]))
    assert found["top1"] == pytest.approx(sum(a == b for a, b in zip(answers, right, strict=True)) / 12)
    assert found["chance1"] == pytest.approx(1 / 3)
    for name, entry in found["by_class"].items():
        hits = [a == name for a, b in zip(answers, right, strict=True) if b == name]
        assert (entry["pictures"], entry["top1"]) == (4, pytest.approx(sum(hits) / 4))
    assert found["mean_over_classes"] == pytest.approx(found["top1"])
    assert "zero-shot by class" in capsys.readouterr().out
    assert (out / "zero_shot.png").exists()


def test_zero_shot_in_shards(model_folder, shard, tmp_path, capsys):
    """Several classes for some pictures, none for one; names and templates from files; retrieval besides."""
    (tmp_path / "classes.json").write_text('{"a": ["first", "erste"], "b": "Second_One", "c": "unused"}')
    (tmp_path / "templates.txt").write_text("the {}\n{}\n")
    options = ["--class-key", "sort", "--classes", tmp_path / "classes.json", "--templates", tmp_path / "templates.txt"]
    assert evaluate(model_folder, "--data", shard, *options, "--retrieval", "--out", tmp_path / "out") == 0
    found = results_of(tmp_path / "out")
    assert "retrieval" in found
    classes = {"a": ("first", "erste"), "b": ("Second_One",), "c": ("unused",)}
    answers = plain_zero_shot(classes, ("the {}", "{}"), list(range(1, 12)))
    right = [record.get("sort") for record in gallery.records(12)[1:]]
    assert found["zero_shot"]["top1"] == pytest.approx(sum(a in b for a, b in zip(answers, right, strict=True)) / 11)
    assert found["zero_shot"]["by_class"]["a"]["pictures"] == 2
    assert found["zero_shot"]["by_class"]["b"]["pictures"] == 11
    assert "left out of zero-shot: 1 pictures without a class" in capsys.readouterr().out


def test_unreadable_pictures_are_left_out_and_told(model_folder, tmp_path, capsys):
    shard = gallery.shard(tmp_path / "broken.tar", broken=(3, 7))
    assert evaluate(model_folder, "--data", shard, "--out", tmp_path / "out") == 0
    found = results_of(tmp_path / "out")
    assert found["pictures"] == found["retrieval"]["pictures"] == 10
    assert len(found["skipped"]) == 2 and "sample 003" in found["skipped"][0]
    assert capsys.readouterr().out.count("left out: ") == 2
    kept = [i for i in range(12) if i not in (3, 7)]
    captions = [gallery.records(12)[i]["captions"] for i in kept]
    to_image, _ = plain_recall(gallery.vectors(gallery.model(), kept), captions, 1)
    assert found["retrieval"]["text_to_image"]["recall"]["1"] == pytest.approx(to_image)


def test_bfloat16(model_folder, shard, tmp_path):
    assert evaluate(model_folder, "--data", shard, "--precision", "bf16", "--out", tmp_path) == 0
    assert "bfloat16" in results_of(tmp_path)["model"]


def test_tokenizer_elsewhere(model_folder, shard, tmp_path, capsys):
    bare = tmp_path / "model"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        os.link(model_folder / name, bare / name)
    assert_error(capsys, evaluate, bare, "--data", shard, parts=["no tokenizer there", "give one with --tokenizer"])
    assert evaluate(bare, "--data", shard, "--tokenizer", "bytes") == 0
    (tmp_path / "broken.json").write_text("{")
    options = ["--data", shard, "--tokenizer", tmp_path / "broken.json"]
    assert_error(capsys, evaluate, bare, *options, parts=["broken.json"])


def assert_error(capsys, command, *arguments, parts):
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        command(*arguments)
    printed = capsys.readouterr().err
    assert end.value.code == 2
    assert printed.startswith("vlkern: error: ") and printed.count("\n") == 1, printed
    for part in parts:
        assert part in printed, printed


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ([], "give --images DIR or --data SHARDS, got neither"),
        (["--data", "SHARD", "--images", "EMPTY"], "give --images DIR or --data SHARDS, got both"),
        (["--data", "nowhere.tar"], "nowhere.tar: no such shard"),
        (["--images", "nowhere"], "--images nowhere: no such folder"),
        (["--images", "EMPTY"], "no pictures there"),
        (["--images", "FLAT"], "expected a folder for each class, got 000.png beside them"),
        (["--data", "SHARD", "--k", "13"], "--k 13: there are only 12 pictures"),
        (["--data", "SHARD", "--k", "0"], "must be at least 1, got 0"),
        (["--data", "SHARD", "--languages", "xx"], "no picture has a name in 'xx' (there are de, mi)"),
        (["--data", "SHARD", "--languages", "dee"], "did you mean 'de'?"),
        (["--data", "SHARD", "--languages", "de", "--names-key", "category"], "no picture has an object language"),
        (["--data", "SHARD", "--class-key", "nothing"], "the .json needs `nothing`"),
        (["--data", "SHARD", "--class-key", "nothing", "--retrieval"], "no picture has a class"),
        (["--data", "SHARD", "--class-key", "category", "--classes", "CLASSES"], "not among the 2 there: 'blue'"),
        (["--data", "SHARD", "--classes", "CLASSES"], "--classes needs --class-key (with --data) or --images"),
        (["--images", "EMPTY", "--languages", "de"], "--languages needs --data"),
        (["--data", "SHARD", "--class-key", "category", "--templates", "nothing"], "--templates nothing: expected"),
        (["--data", "SHARD", "--out", "CLASSES/deeper"], "cannot write there"),
        (["--data", "SHARD", "--device", "warp"], "--device warp: not available"),
    ],
)
def test_errors(model_folder, shard, tmp_path, capsys, monkeypatch, options, part):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FLAT").mkdir()
    (tmp_path / "FLAT" / "000.png").write_bytes(gallery.noise(0))
    (tmp_path / "CLASSES").write_text('["red", "green"]')
    before = sorted(tmp_path.rglob("*"))
    options = [shard if option == "SHARD" else option for option in options]
    assert_error(capsys, evaluate, model_folder, *options, parts=[part])
    assert sorted(tmp_path.rglob("*")) == before


def test_no_model(shard, tmp_path, capsys):
    assert_error(capsys, evaluate, tmp_path / "nowhere", "--data", shard, parts=["--model", "no such folder or file"])
    assert_error(capsys, evaluate, tmp_path, "--data", shard, parts=[str(tmp_path)])


def test_unwritable_folder_leaves_nothing(model_folder, shard, tmp_path, capsys, monkeypatch):
    """The disk is full when the plots are written: no results.json, and no part of a file."""
    from vlkern.evaluation import report

    def full(path, content):
        raise UserError(f"{path}: cannot be written (No space left on device)")

    monkeypatch.setattr(report, "write_file", full)
    options = ["--data", shard, "--out", tmp_path]
    assert_error(capsys, evaluate, model_folder, *options, parts=["No space left on device"])
    assert list(tmp_path.iterdir()) == []


def test_tables(capsys, monkeypatch):
    table = Table("some [b]title[/b]", ["name", "value"], [["a|b [red]", "1"], ["c", "22"]])
    assert table.plain().splitlines()[1:] == ["name       value", "a|b [red]      1", "c             22"]
    assert "| a\\|b [red] | 1 |" in table.markdown()
    assert cut(table.rows, 1) == [["a|b [red]", "1"], ["... 1 more", ""]]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    table.show()
    assert "a|b [red]" in capsys.readouterr().out and cut(table.rows, 2) == table.rows


@pytest.mark.parametrize(
    ("content", "resample"), [("", "bilinear"), ('{"resample": 3}', "bicubic"), ("[]", "bilinear")]
)
def test_resizing_follows_the_checkpoint(tmp_path, content, resample):
    gallery.save(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(content)
    assert load_encoder(tmp_path).resample == resample

"""`vlkern eval m2t` from the command line: what it writes, and what it says when it cannot."""

import json

import pytest
import torch
from PIL import Image

from vlkern import cli, codec, data, models


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("codec") / "model"
    models.save_pretrained(models.create("m2t-tiny"), folder)
    return folder


@pytest.fixture(scope="module")
def picture():
    with Image.open(data.photos() / "eval" / "03-red-panda.webp") as opened:
        return opened.convert("RGB").crop((300, 200, 380, 264))


def evaluate(*arguments):
    return cli.main(["eval", "m2t", *map(str, arguments)])


def test_sizes_are_those_of_the_files_of_vlkern_compress(model_folder, picture, tmp_path, capsys):
    folder, out = tmp_path / "pictures", tmp_path / "out"
    (folder / "deeper").mkdir(parents=True)
    picture.save(folder / "deeper" / "panda.png")
    (folder / "broken.jpg").write_bytes(b"no picture")
    assert evaluate("--model", model_folder, "--data", folder, "--quality", 4, 0, "--out", out) == 0

    results = json.loads((out / "results.json").read_text())
    assert (results["pictures"], len(results["skipped"])) == (["deeper/panda.png"], 1)
    ours = [point for point in results["points"] if point["codec"] == "vlkern"]
    of_file = codec.load(model_folder)
    assert [(p["quality"], p["size"]) for p in ours] == [
        (level, len(codec.compress(picture, quality=level, codec=of_file))) for level in (0, 4)
    ]
    assert [p["bpp"] for p in ours] == [8 * p["size"] / (80 * 64) for p in ours]
    assert {p["ms_ssim"] for p in results["points"]} == {None}  # too small for five scales
    assert next(iter(results["savings"])) == "JPEG"

    printed = capsys.readouterr().out
    assert "broken.jpg: is no picture that Pillow can read" in printed and "against JPEG" in printed
    assert "<h3>deeper/panda.png</h3>" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--quality", 2], "--quality: expected two levels or more"),
        (["--quality", 2, 5], "--quality 5: expected levels from 0 to 4"),
        (["--exact", "integer"], "--exact integer: the model has no weights for it"),
        (["--data", "nowhere"], "--data nowhere: no such folder"),
        (["--data", "."], "--data .: no picture can be read"),
        (["--model", "nowhere"], "--model nowhere"),
    ],
)
def test_what_cannot_be(arguments, words, model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        evaluate("--model", model_folder, *arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error

"""compress, decompress and inspect as a user meets them."""

import io
import os
import stat
import sys
import threading

import numpy as np
import pytest
from PIL import Image
from tiny import picture, tiny

from vlkern import codec, models
from vlkern.cli import main

SIZE = (70, 150)


def call(capfd, *arguments):
    """Status, stdout, stderr of a process of its own."""
    try:
        code = main([str(a) for a in arguments])
    except SystemExit as end:
        code = end.code
    return (code, *capfd.readouterr())


def refused(capfd, message, *arguments):
    code, out, err = call(capfd, *arguments)
    assert (code, out) == (2, "") and err.startswith("vlkern: error: ") and err.count("\n") == 1, err
    assert message in err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and a picture as picture.png and file.vlk."""
    path = tmp_path_factory.mktemp("codec")
    models.save_pretrained(tiny().model, path / "model")
    pixels = picture(*SIZE)
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(path / "picture.png")
    (path / "file.vlk").write_bytes(codec.compress(pixels, quality=3, codec=tiny(), batch=4))
    return path


def test_there_and_back(folder, tmp_path, capfd):
    model = ("--model", folder / "model")
    made, seen = tmp_path / "a.vlk", tmp_path / "a.png"
    code, out, err = call(capfd, "compress", folder / "picture.png", made, "--quality", 3, "--exact", "float", *model)
    expected = codec.compress(picture(*SIZE), quality=3, codec=tiny())
    assert (code, err) == (0, "") and made.read_bytes() == expected
    size = f"{len(expected):,} bytes, {8 * len(expected) / 10500:.4f} bits per pixel"
    assert out == f"{made}: 150 x 70, {size}\n"
    assert call(capfd, "decompress", made, seen, *model) == (0, f"{seen}: 150 x 70\n", "")
    assert np.array_equal(Image.open(seen), codec.decompress(expected, codec=tiny()))
    assert stat.S_IMODE(seen.stat().st_mode) == 0o666 & ~_umask() and len(os.listdir(tmp_path)) == 2


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_inspect_needs_no_model_for_the_header(folder, capfd):
    code, out, err = call(capfd, "inspect", folder / "file.vlk")
    assert (code, err) == (0, "")
    assert "150 x 70, " in out
    assert f"version 1, float, quality 3, model {tiny().name('float').hex()}" in out
    assert "6 of 64 x 64 pixels in 2 segments" in out
    rows = [line.split() for line in out.splitlines() if "bpp" in line]
    assert [row[0] for row in rows] == ["0-3", "4-5"]
    assert max(len(row[-1]) for row in rows) == 40 and set(rows[0][-1]) == {"█"}


def test_inspect_measures_and_draws(folder, tmp_path, capfd):
    plot = tmp_path / "bits.png"
    options = "--original", folder / "picture.png", "--plot", plot, "--model", folder / "model"
    code, out, err = call(capfd, "inspect", folder / "file.vlk", *options)
    assert (code, err) == (0, "")
    original, found = (
        np.asarray(image, dtype=np.float64)
        for image in (
            Image.open(folder / "picture.png"),
            codec.decompress((folder / "file.vlk").read_bytes(), codec=tiny()),
        )
    )
    psnr = 10 * np.log10(255**2 / ((original - found) ** 2).mean())
    assert f"PSNR      {psnr:.2f} dB\n" in out
    drawn = np.asarray(Image.open(plot).convert("RGB"))
    assert drawn.shape[0] > 300 and len(np.unique(drawn.reshape(-1, 3), axis=0)) > 100


def test_errors_of_compress(folder, tmp_path, capfd):
    picture_file, out, model = folder / "picture.png", tmp_path / "a.vlk", ("--model", folder / "model")
    refused(capfd, "nowhere.png: cannot be read (No such file", "compress", tmp_path / "nowhere.png", out)
    refused(capfd, "file.vlk: is no picture that Pillow can read", "compress", folder / "file.vlk", out)
    refused(capfd, "expected another file than the one that is read", "compress", picture_file, picture_file)
    refused(capfd, "is a folder, expected a file name", "compress", picture_file, tmp_path)
    refused(
        capfd,
        "argument --quality: expected a whole number, got 'best'",
        "compress",
        picture_file,
        out,
        "--quality",
        "best",
    )
    refused(
        capfd,
        "--quality must be a whole number from 0 to 4, got 21",
        "compress",
        picture_file,
        out,
        "--quality",
        21,
        *model,
    )
    refused(capfd, "--exact must be float with this model", "compress", picture_file, out, "--exact", "integer", *model)
    refused(capfd, "argument --exact: invalid choice: 'no'", "compress", picture_file, out, "--exact", "no", *model)
    refused(
        capfd,
        f"--model {tmp_path / 'no'}: no such file or directory",
        "compress",
        picture_file,
        out,
        "--model",
        tmp_path / "no",
    )
    refused(capfd, "cannot write there", "compress", picture_file, "/proc/a.vlk")
    assert not os.listdir(tmp_path)


def test_a_model_of_another_kind_is_refused(folder, tmp_path, capfd):
    models.save_pretrained(models.create("fsq-tiny"), tmp_path / "fsq")
    refused(
        capfd,
        "expected an M2T, got FsqAutoencoder",
        "compress",
        folder / "picture.png",
        tmp_path / "a.vlk",
        "--model",
        tmp_path / "fsq",
    )


def test_errors_of_decompress_leave_what_was_there(folder, tmp_path, capfd):
    out, model = tmp_path / "a.png", ("--model", folder / "model")
    out.write_bytes(b"what was there")
    whole = (folder / "file.vlk").read_bytes()
    damaged = tmp_path / "damaged.vlk"
    damaged.write_bytes(whole[:-1])
    refused(capfd, f"{damaged}: cut short: expected {len(whole)} bytes", "decompress", damaged, out, *model)
    refused(capfd, "picture.png: no picture of vlkern", "decompress", folder / "picture.png", out, *model)
    refused(capfd, "a.jpg: expected a name that ends in .png", "decompress", folder / "file.vlk", tmp_path / "a.jpg")
    models.save_pretrained(tiny(1).model, tmp_path / "other")
    other = "--model", tmp_path / "other"
    refused(capfd, "file.vlk: made with the model", "decompress", folder / "file.vlk", out, *other)
    assert out.read_bytes() == b"what was there"
    assert sorted(os.listdir(tmp_path)) == ["a.png", "damaged.vlk", "other"]


def test_a_full_disk_leaves_what_was_there(folder, tmp_path, capfd, monkeypatch):
    out = tmp_path / "a.vlk"
    out.write_bytes(b"what was there")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    refused(
        capfd, f"{out}: cannot be written (No space left on device)",
        "compress", folder / "picture.png", out, "--model", folder / "model",
    )  # fmt: skip
    assert out.read_bytes() == b"what was there" and os.listdir(tmp_path) == ["a.vlk"]


def test_an_interrupted_write_leaves_what_was_there(folder, tmp_path, capfd, monkeypatch):
    out = tmp_path / "a.vlk"
    out.write_bytes(b"what was there")

    def interrupt(handle):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    said = call(capfd, "compress", folder / "picture.png", out, "--model", folder / "model")
    assert said == (130, "", "vlkern: interrupted\n")
    assert out.read_bytes() == b"what was there" and os.listdir(tmp_path) == ["a.vlk"]


def test_links_stay_and_pipes_are_filled(folder, tmp_path, capfd):
    """What is no file is not replaced by one: /dev/null least of all."""
    (tmp_path / "there").mkdir()
    link, pipe, model = tmp_path / "a.vlk", tmp_path / "pipe", ("--model", folder / "model")
    link.symlink_to(tmp_path / "there" / "b.vlk")
    assert call(capfd, "compress", folder / "picture.png", link, *model)[0] == 0
    data = (tmp_path / "there" / "b.vlk").read_bytes()
    assert link.is_symlink() and os.listdir(tmp_path / "there") == ["b.vlk"]
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()), daemon=True)
    reader.start()
    assert call(capfd, "compress", folder / "picture.png", pipe, *model)[0] == 0
    reader.join(10)
    assert read == [data] and pipe.is_fifo()


class Streams:
    """Standard input and output of a process in a pipe."""

    def __init__(self, monkeypatch, data):
        self.out = io.BytesIO()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(self.out, write_through=True))


def test_standard_streams(folder, capfd, monkeypatch):
    model, file = ("--model", folder / "model"), (folder / "file.vlk").read_bytes()
    with monkeypatch.context() as patched:
        streams = Streams(patched, (folder / "picture.png").read_bytes())
        code, _, err = call(capfd, "compress", "-", "-", "--quality", 3, *model)
        made = streams.out.getvalue()
    assert code == 0 and err.startswith("-: 150 x 70, ") and err.count("\n") == 1
    assert made == codec.compress(picture(*SIZE), quality=3, codec=tiny())
    with monkeypatch.context() as patched:
        streams = Streams(patched, file)
        assert call(capfd, "decompress", "-", "-", *model) == (0, "", "-: 150 x 70\n")
        seen = Image.open(io.BytesIO(streams.out.getvalue()))
    assert seen.format == "PNG" and np.array_equal(seen, codec.decompress(file, codec=tiny()))
    with monkeypatch.context() as patched:
        Streams(patched, b"nothing")
        refused(capfd, "-: no picture of vlkern", "inspect", "-")
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        refused(capfd, "OUT -: expected a pipe or a file", "compress", folder / "picture.png", "-", *model)


@pytest.mark.parametrize("buffering", [1, -1])
@pytest.mark.parametrize("command", ["inspect", "compress"])
def test_standard_output_on_a_full_disk(command, buffering, folder, tmp_path, capfd, monkeypatch):
    """Whether the first line or the last flush fails."""
    told = {"inspect": [folder / "file.vlk"], "compress": [folder / "picture.png", "-", "--model", folder / "model"]}
    with open("/dev/full", "w", buffering) as full, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", full)
        refused(capfd, "standard output: cannot be written (No space left on device)", command, *told[command])


def test_errors_of_inspect(folder, tmp_path, capfd):
    file = folder / "file.vlk"
    small = tmp_path / "small.png"
    Image.new("RGB", (8, 8)).save(small)
    refused(capfd, "--plot a.svg: expected a name that ends in .png", "inspect", file, "--plot", "a.svg")
    refused(capfd, "expected 150 x 70 pixels, got 8 x 8", "inspect", file, "--original", small)
    refused(capfd, "no picture of vlkern", "inspect", small)

"""`vlkern search` against plain loops: hits, page, index, and what it says when it cannot."""

import base64
import io
import os
import re
from html.parser import HTMLParser

import gallery
import pytest
import safetensors.torch
import torch
from PIL import Image

from vlkern import cli
from vlkern.evaluation.encoder import Encoder
from vlkern.search import Index, best, load_index, save_index
from vlkern.search.page import Card, hits_page, thumbnail

QUERIES = ["a red car", "zwei Äpfel & <b>"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return gallery.save(tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(tmp_path):
    return gallery.folder(tmp_path / "pictures")


@pytest.fixture
def embedded(monkeypatch):
    """How many pictures went through the model."""
    counts = []
    images = Encoder.images
    monkeypatch.setattr(Encoder, "images", lambda self, pixels: counts.append(len(pixels)) or images(self, pixels))
    return counts


def search(model_folder, *arguments, queries=QUERIES):
    return cli.main(["search", "--model", str(model_folder), "--batch", "5", *map(str, arguments), *queries])


def plain(numbers, query):
    """(number, cosine) of pictures, best first."""
    model = gallery.model()
    cosine = gallery.vectors(model, numbers) @ gallery.words(model, [query])[0]
    return [(numbers[i], cosine[i].item()) for i in cosine.argsort(descending=True)]


def printed_hits(printed):
    """Query -> [(cosine, name)]."""
    blocks = re.split(r"^“(.*)”$", printed, flags=re.M)[1:]
    found = {}
    for query, text in zip(blocks[::2], blocks[1::2], strict=True):
        rows = [line.split() for line in text.strip().splitlines()[1:]]
        found[query] = [(row[-2], row[-1]) for row in rows]
    return found


def test_hits(model_folder, folder, capsys):
    assert search(model_folder, "--images", folder) == 0
    found = printed_hits(capsys.readouterr().out)
    assert list(found) == QUERIES
    for query, rows in found.items():
        expected = [
            (f"{cosine:.3f}", f"{gallery.records(12)[i]['category']}/{i:03}.png")
            for i, cosine in plain(list(range(12)), query)[:8]
        ]
        assert rows == expected


def test_probability():
    model = gallery.model()
    with torch.no_grad():
        model.logit_scale.fill_(3.0)
        model.logit_bias.fill_(-2.0)
    encoder = Encoder(model, gallery.data.ByteTokenizer(24))
    images = gallery.vectors(model, [0, 1, 2])
    (hits,) = best(encoder, images, ["cat"], 3)
    cosine = images @ gallery.words(model, ["cat"])[0]
    for hit in hits:
        assert hit.cosine == pytest.approx(cosine[hit.picture].item(), abs=1e-6)
        logit = torch.tensor(3.0).exp() * cosine[hit.picture] - 2
        assert hit.probability == pytest.approx(torch.sigmoid(logit).item(), abs=1e-6)
    with pytest.raises(ValueError, match="count must be 1 to 3, the number of pictures, got 4"):
        best(encoder, images, ["cat"], 4)


def test_shards(model_folder, tmp_path, capsys):
    shard = gallery.shard(tmp_path / "test.tar", broken=(4,))
    assert search(model_folder, "--data", shard, "--count", 1) == 0
    printed = capsys.readouterr().out
    number, _ = plain([i for i in range(12) if i != 4], QUERIES[0])[0]
    assert f"{number:03} ({number}): caption {number} 0" in printed
    assert "1 left out, because they cannot be read:" in printed and "sample 004" in printed


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page(model_folder, folder, tmp_path, capsys):
    (folder / "red" / "broken.jpg").write_bytes(b"nothing")
    (folder / "blue" / "cut <i>.png").write_bytes(gallery.noise(1)[:300])
    page = tmp_path / "deep" / "hits.html"
    assert search(model_folder, "--images", folder, "--page", page, "--count", 3) == 0
    assert "2 left out, because they cannot be read:" in capsys.readouterr().out
    text = page.read_text(encoding="utf-8")
    found = Page(text)
    assert found.open == [] and found.tags.count("img") == 6
    assert found.links and all(link.startswith("data:image/") for link in found.links)
    assert "zwei Äpfel &amp; &lt;b&gt;" in text and "<b>" not in text and "<i>" not in text
    assert "red/broken.jpg: " in text and "2 could not be read" in text
    (number, cosine), *_ = plain(list(range(12)), QUERIES[0])
    first = text[text.index("<figure>") : text.index("</figure>")]
    assert f"{number:03}.png" in first and f"{cosine:.3f}" in first
    assert base64.b64encode(gallery.noise(number)).decode() in first  # small pictures stay as they are
    assert sorted(path.name for path in page.parent.iterdir()) == ["hits.html"]


def test_thumbnails():
    def large(kind, **options):
        out = io.BytesIO()
        Image.new("RGB", (1200, 600), "red").save(out, kind, **options)
        return out.getvalue()

    def shown(uri):
        kind, _, content = uri.partition(";base64,")
        return kind, Image.open(io.BytesIO(base64.b64decode(content)))

    kind, image = shown(thumbnail(large("JPEG")))
    assert (kind, image.size) == ("data:image/webp", (256, 128))
    turned = Image.Exif()
    turned[0x0112] = 6  # a camera held upright
    assert shown(thumbnail(large("JPEG", exif=turned)))[1].size == (128, 256)
    assert shown(thumbnail(large("BMP"), side=4000))[0] == "data:image/webp"  # not every browser shows the others
    with pytest.raises(ValueError, match="no readable picture"):
        thumbnail(b"nothing")


def test_page_without_a_picture_that_has_gone():
    text = hits_page({}, [("q", [Card("", "gone.png", "1 %")])], [])
    assert "gone.png" in text and "<img" not in text and Page(text).open == []


def test_index_is_reused(model_folder, folder, tmp_path, capsys, embedded):
    index = tmp_path / "index.safetensors"
    options = ["--images", folder, "--index", index]
    search(model_folder, *options)
    assert sum(embedded) == 12
    fresh = printed_hits(capsys.readouterr().out)
    search(model_folder, *options)
    assert sum(embedded) == 12  # not one more
    printed = capsys.readouterr().out
    assert printed_hits(printed) == fresh and f"12 of them from {index}" in printed

    (folder / "red" / "000.png").write_bytes(gallery.noise(100))  # changed
    (folder / "green" / "001.png").unlink()  # gone
    (folder / "blue" / "new.png").write_bytes(gallery.noise(101))
    os.utime(folder / "red" / "003.png")  # touched
    (folder / "red" / "broken.png").write_bytes(b"nothing")
    search(model_folder, *options)
    assert sum(embedded) == 15
    printed = capsys.readouterr().out
    assert "12 in" in printed and "9 of them" in printed
    search(model_folder, "--images", folder)  # without an index
    assert printed_hits(capsys.readouterr().out) == printed_hits(printed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.safetensors", "pictures"]


def test_index_of_another_model(model_folder, folder, tmp_path, capsys, embedded):
    index = tmp_path / "index.safetensors"
    search(model_folder, "--images", folder, "--index", index)
    other = gallery.save(tmp_path / "other", seed=1)
    capsys.readouterr()
    search(other, "--images", folder, "--index", index)
    assert sum(embedded) == 24
    printed = capsys.readouterr().out
    assert "of another model" in printed
    search(other, "--images", folder)
    assert printed_hits(capsys.readouterr().out) == printed_hits(printed)
    search(other, "--images", folder, "--index", index, "--precision", "bf16")
    assert sum(embedded) == 48


def test_index_of_a_model_with_other_texts_is_kept(folder, tmp_path, embedded):
    """Embeddings of pictures do not depend on the text tower."""
    model = gallery.model()
    tokenizer = gallery.data.ByteTokenizer(24)
    before = Encoder(model, tokenizer).fingerprint()
    with torch.no_grad():
        model.text_model.head.bias.add_(1)
    assert Encoder(model, tokenizer).fingerprint() == before
    with torch.no_grad():
        model.vision_model.head.probe[0, 0, 0] += 1
    assert Encoder(model, tokenizer).fingerprint() != before


def test_index_round_trip(tmp_path):
    names = ["a.png", "ä b/c.png", os.fsdecode(b"\xff.png")]
    index = Index("f" * 16, names, torch.tensor([[1, 2], [3, 4], [2**60, 5]]), torch.randn(3, 4))
    save_index(index, tmp_path / "index")
    back = load_index(tmp_path / "index")
    assert (back.model, back.names) == (index.model, names)
    assert torch.equal(back.stamps, index.stamps) and torch.equal(back.vectors, index.vectors)


def assert_error(capsys, *arguments, part, **options):
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        search(*arguments, **options)
    printed = capsys.readouterr().err
    assert end.value.code == 2
    assert printed.startswith("vlkern: error: ") and printed.count("\n") == 1, printed
    assert part in printed, printed


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ([], "give --images DIR or --data SHARDS, got neither"),
        (["--images", "nowhere"], "--images nowhere: no such folder"),
        (["--images", "file"], "--images file: not a folder"),
        (["--images", "empty"], "--images empty: no pictures there"),
        (["--images", "bad"], "not one of 1 pictures can be read; the first: a.png: "),
        (["--images", "pictures", "--count", "13"], "--count 13: there are only 12 pictures"),
        (["--images", "pictures", "--count", "many"], "argument --count: expected a whole number"),
        (["--images", "pictures", "--page", "file/hits.html"], "--page file: cannot write there"),
        (["--images", "pictures", "--page", "empty"], "--page empty: is a folder"),
        (["--images", "pictures", "--index", "file/index"], "--index file: cannot write there"),
        (["--images", "pictures", "--index", "file"], "--index file: is not an index of `vlkern search`"),
        (["--images", "pictures", "--index", "other.safetensors"], "is not an index of `vlkern search`"),
        (["--images", "pictures", "--model", "nowhere"], "--model nowhere: no such folder or file"),
        (["--data", "nowhere.tar"], "nowhere.tar: no such shard"),
    ],
)
def test_errors(model_folder, folder, tmp_path, capsys, monkeypatch, options, part):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"nothing")
    (tmp_path / "file").write_text("what the user wants to keep")
    safetensors.torch.save_file({"weight": torch.zeros(3)}, "other.safetensors")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert_error(capsys, model_folder, *options, part=part)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("queries", [[""], ["bird", "  "]])
def test_empty_query(model_folder, folder, capsys, queries):
    assert_error(capsys, model_folder, "--images", folder, part="a query is empty", queries=queries)


def test_no_query(model_folder, folder, capsys):
    assert_error(capsys, model_folder, "--images", folder, part="QUERY", queries=[])

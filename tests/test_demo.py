"""A short run of the whole demo, and the parts that a short run cannot show."""

import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import torch

from vlkern import data
from vlkern.demo import packing
from vlkern.demo.chart import Axis, Bar, Line, bars, draw
from vlkern.demo.report import smooth
from vlkern.demo.training import Batches, Budget
from vlkern.recipes.contrastive import Recipe, learning_rate

#: Smaller batches and loss benchmark than the real one; everything else is the command as users call it.
SHORT = """
import sys
from dataclasses import replace
from vlkern.demo import cli, opbench, packing
cli.RECIPE = replace(cli.RECIPE, batch=64)
opbench.BATCHES = (64, 128)
packing.PICTURES, packing.BATCH = 16, 8
from vlkern.cli import main
sys.exit(main(sys.argv[1:]))
"""


def run_demo(out, *options):
    command = [sys.executable, "-c", SHORT, "demo", "--steps", "24", "--out", str(out), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    done = run_demo(out, "--queries", "red flag", "<b>bold</b> & more", "bird")
    assert done.returncode == 0, done.stderr
    return done.stdout, (out / "report.html").read_text(encoding="utf-8")


def test_console(short_run):
    printed, _ = short_run
    assert "2000 pictures to learn from, 400 held out" in printed
    assert "sigmoid_contrastive_loss: " in printed
    assert "text to image @1" in printed and "image to text @1" in printed
    assert "@1  0.2 %  @5  1.2 %  @10  2.5 %" in printed  # chance
    assert len(re.findall(r"B=\d+ +fused +[\d.]+ ms +[\d.]+ MiB extra +eager +[\d.]+ ms", printed)) == 2
    assert "packing   16 pictures, naflex-tiny: padded " in printed
    assert len(re.findall(r"packed +[\d.]+ pictures/s +padded +[\d.]+ pictures/s +[\d.]+x", printed)) == 1
    assert len(re.findall(r"^search ", printed, re.M)) == 3


def test_loss_falls(short_run):
    printed, _ = short_run
    first, last = map(float, re.search(r"loss ([\d.]+) -> ([\d.]+)", printed).groups())
    assert 8 < first < 12  # about softplus(10 - 25 cos(x_i, y_i)): the positive pairs, which all look like negatives
    assert last < 0.8 * first


class Page(HTMLParser):
    """Collects what the page is made of, and where it points outside itself."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img", "path", "circle", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report(short_run):
    _, text = short_run
    page = Page(text)
    assert page.open == []
    assert page.tags.count("svg") == 5  # loss, time, memory, tokens, pictures per second
    assert page.tags.count("img") == 3 * 8
    assert page.tags.count("table") == 2
    assert page.links and all(link.startswith("data:image/") for link in page.links)
    words = re.sub(r"data:image/[^\"]*", "", text)
    assert "http" not in words
    assert not re.search(r"\bnan\b", words, re.I)
    assert "&lt;b&gt;bold&lt;/b&gt; &amp; more" in text and "<b>bold" not in text
    assert "Packed instead of padded" in text
    for word in ("Searches", "Retrieval", "recall@10", "2.50 %", "eager PyTorch", "prefers-color-scheme: dark"):
        assert word in text


def test_batches_are_fixed_by_the_seed_and_cover_every_picture():
    pairs = data.load_pairs([data.clipart_mini() / "test.tar"], 8)
    # Tell pictures apart by their caption: one different byte sequence each.
    pairs.captions = [(f"{i}",) for i in range(len(pairs))]
    tokenizer = data.ByteTokenizer(8)

    def take(seed, count):
        stream = iter(Batches(pairs, tokenizer, 150, seed))
        return [next(stream) for _ in range(count)]

    one, same, other = take(1, 8), take(1, 8), take(2, 8)
    assert all(torch.equal(a, b) for x, y in zip(one, same, strict=True) for a, b in zip(x, y, strict=True))
    assert not torch.equal(one[0][0], other[0][0])
    seen = [int(t) for _, ids in one for t in tokenizer.decode(ids)]
    assert sorted(seen[:400]) == list(range(400))
    assert sorted(seen[400:800]) == list(range(400))


def test_all_captions_are_used():
    pairs = data.load_pairs([data.clipart_mini() / "test.tar"], 8)
    tokenizer = data.ByteTokenizer(200)
    stream = iter(Batches(pairs, tokenizer, 400, 0))
    seen = {text for _ in range(30) for text in tokenizer.decode(next(stream)[1])}
    assert seen == {caption.lower() for captions in pairs.captions for caption in captions}


def test_budget_and_schedule():
    budget = Budget(steps=100, seconds=50)
    assert budget.progress(0, 0) == 0
    assert budget.progress(60, 10) == 0.6
    assert budget.progress(10, 40) == 0.8
    recipe = Recipe(batch=8, rate=2.0, warm_up=10)
    assert learning_rate(recipe, 0, 0.0) == pytest.approx(0.2)
    assert learning_rate(recipe, 4, 0.0) == pytest.approx(1.0)
    assert learning_rate(recipe, 50, 0.0) == 2.0
    assert learning_rate(recipe, 50, 0.5) == pytest.approx(1.0)
    assert learning_rate(recipe, 50, 1.0) == pytest.approx(0.0, abs=1e-9)


def test_smooth():
    assert smooth([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    assert smooth([]) == []


def test_chart_puts_points_where_they_belong():
    svg = draw([Line("a <b>", "ours", [1, 10, 100], [0.1, 1, 10], dots=True)], Axis("x", True), Axis("y & z", True))
    assert "a &lt;b&gt;" in svg and "y &amp; z" in svg
    places = [tuple(map(float, p)) for p in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg)]
    (x0, y0), (x1, y1), (x2, y2) = places
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert y0 > y2


def test_bars_are_as_long_as_their_values():
    svg = bars("a & b", [Bar("<x>", "rival", 200, "150 and 50", full=150), Bar("y", "ours", 100, "half")])
    assert "a &amp; b" in svg and "&lt;x&gt;" in svg
    full, rest, half = (float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)"', svg))
    assert full + rest == pytest.approx(2 * half, abs=0.2)
    assert full == pytest.approx(3 * rest, abs=0.4)
    assert re.findall(r'<rect class="([^"]+)"', svg) == ["rival", "rival pale", "ours"]


def few_pictures(monkeypatch):
    monkeypatch.setattr(packing, "PICTURES", 12)
    monkeypatch.setattr(packing, "BATCH", 5)
    return data.load_pairs([data.clipart_mini() / "test.tar"], 8).files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_counts_tokens(monkeypatch, dtype):
    files = few_pictures(monkeypatch)
    found = packing.measure(files, dtype, "cpu")
    # What the shapes say, without a tower: the longer side at most 8 patches, none enlarged by more than rounding.
    sizes = [data.decode_image(file, lambda h, w: (h, w)).shape[1:] for file in files[:12]]
    lengths = [max(1, round(h / 8)) * max(1, round(w / 8)) for h, w in sizes]
    assert found.pictures == 12
    assert found.tokens == sum(lengths)
    assert found.slots == sum(max(part) * len(part) for part in (lengths[:5], lengths[5:10], lengths[10:]))
    assert found.wasted == pytest.approx(1 - found.tokens / found.slots)
    assert found.speedup == pytest.approx(found.rate("packed") / found.rate("padded"))


def test_packing_is_not_timed_if_pads_are_seen(monkeypatch):
    files = few_pictures(monkeypatch)
    right = packing._padded_places

    def all_slots(shapes, slots):
        at = right(shapes, slots)
        return at._replace(stop=at.start + slots)

    monkeypatch.setattr(packing, "_padded_places", all_slots)
    with pytest.raises(RuntimeError, match="packed and padded tokens must agree"):
        packing.measure(files, torch.float32, "cpu")

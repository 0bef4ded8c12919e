"""The pictures of docs/masks.md are those that its code draws.

To draw them anew: python tests/test_masks_pictures.py
"""

import doctest
import os
import shutil
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from test_docs import FENCE

from vlkern import masks
from vlkern.masks import _picture

DOCS = Path(__file__).parents[1] / "docs"


def drawn(folder):
    """Runs the page's code without prompts in `folder`, where it writes its pictures."""
    names = {"torch": torch, "masks": masks, "cu_seqlens": torch.tensor([0, 6, 8, 12], dtype=torch.int32)}
    before = Path.cwd()
    os.chdir(folder)
    try:
        for language, code in FENCE.findall((DOCS / "masks.md").read_text()):
            if language == "python" and ">>>" not in code:
                exec(code, names)
    finally:
        os.chdir(before)
    return sorted(Path(folder).glob("*.svg"))


def test_the_pictures_of_the_page(tmp_path):
    pictures = drawn(tmp_path)
    assert [p.name for p in pictures] == [p.name for p in sorted((DOCS / "masks").iterdir())]
    page = (DOCS / "masks.md").read_text()
    for picture in pictures:
        assert picture.read_text() == (DOCS / "masks" / picture.name).read_text(), picture.name
        assert f"![](masks/{picture.name})" in page


def parts(svg, kind):
    root = ET.fromstring(svg)
    return [part.attrib for part in root.iter() if part.attrib.get("class") == kind]


def test_a_picture_is_its_mask():
    """A bar for each row that sees a key, from start to stop; a dot where the own key is seen; framed documents."""
    cu = torch.tensor([0, 5, 5, 9])
    spans = masks.spans(torch.tensor([1, 6]), torch.tensor([4, 8]))
    mask = masks.documents(cu) & spans
    start, stop = mask.bounds(9)
    svg = masks.draw(mask, 9)
    bars, seen = parts(svg, "row"), (start < stop).nonzero()[:, 0]
    assert len(bars) == len(seen) == len(parts(svg, "own")) == 5
    for bar, i in zip(bars, seen.tolist(), strict=True):
        x, width, y = (float(bar[name]) for name in ("x", "width", "y"))
        assert round((x - 22.5) / 16) == start[i] and round((x + width - 22.5) / 16) == stop[i]
        assert round((y - 22.5) / 16) == i
    assert len(parts(svg, "segment")) == 3


@pytest.mark.parametrize(("sizes", "side"), [((3, 3), 72), ((1000, 1000), 504), ((10, 4000), 504), ((0, 0), 24)])
def test_sizes(sizes, side):
    root = ET.fromstring(masks.draw(masks.causal(), *sizes))
    assert max(int(root.attrib["width"]), int(root.attrib["height"])) == side


def test_the_text_is_escaped():
    assert "&amp;" in masks.draw(masks.causal() & masks.window(2), 3)


def test_bad_masks_are_not_drawn():
    with pytest.raises(ValueError, match="cu_seqlens must end with Nq, 4, got 3"):
        masks.draw(masks.documents(torch.tensor([0, 3])), 4)


def test_the_example_of_the_docstring():
    failed, tried = doctest.testmod(_picture, extraglobs={"torch": torch, "masks": masks})
    assert tried == 2 and failed == 0


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for picture in drawn(folder):
            shutil.copy(picture, DOCS / "masks" / picture.name)

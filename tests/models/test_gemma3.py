"""Gemma 3 that sees against transformers: image blocks, windows smaller than these, caches; and bad input."""

import doctest
from dataclasses import replace

import pytest
import torch
from goldens import Golden, assert_close
from multimodal_peers import GEMMA3, pair, same_gradients
from test_paligemma import close, packed

import vlkern.models
from vlkern.models import gemma3
from vlkern.models.gemma3 import Gemma3, Projector

#: Where the pictures of each row begin, and how many tokens it has; blocks at both ends of a row, and side by side.
ROWS = (((3, 15), 30), ((), 7), ((0, 16), 25), ((1, 10), 22))


def prompt(rows, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = []
    for starts, length in rows:
        row = torch.randint(2, 60, (length,), generator=g)
        for start in starts:
            row[start : start + 9] = 62
        ids.append(row)
    return ids, torch.rand(sum(len(starts) for starts, _ in rows), 3, 36, 36, generator=g) * 2 - 1


def their_logits(model, ids, pixels):
    out = []
    for row in ids:
        count = int((row == 62).sum()) // 9
        seen = {"pixel_values": pixels[:count], "token_type_ids": (row == 62).long()[None]} if count else {}
        out.append(model(input_ids=row[None], **seen).logits[0])
        pixels = pixels[count:]
    return torch.cat(out)


@pytest.fixture(scope="module")
def models():
    return pair(GEMMA3)


def test_packed_rows_and_gradients(models):
    ours, theirs = models
    ids, pixels = prompt(ROWS)
    flat, cu = packed(ids)
    got = ours.logits(ours.hidden(ours.embed(flat, pixels), cu, until=ours.until(flat, cu)))
    expected = their_logits(theirs, ids, pixels)
    close(got, expected)
    same_gradients(ours, theirs, got, expected)


@torch.no_grad()
def test_forward(models):
    ours, theirs = models
    ids, pixels = prompt([((3, 15), 30), ((20,), 30)])
    close(ours(torch.stack(ids), pixels), their_logits(theirs, ids, pixels).unflatten(0, (2, 30)))


def pieces(row, most):
    """Pieces of about `most` tokens, image blocks whole."""
    found, start = [], 0
    while start < len(row):
        stop = min(start + most, len(row))
        while stop < len(row) and row[stop] == 62 and row[stop - 1] == 62:
            stop += 1
        found.append((start, stop))
        start = stop
    return found


@torch.no_grad()
@pytest.mark.parametrize("most", [1, 4, 11, 100])
def test_chunks(models, most):
    """A prompt in chunks that do not cut images, rows out of step: the window is 5, images have 9 tokens."""
    ours, theirs = models
    ids, pixels = prompt(ROWS)
    expected = their_logits(theirs, ids, pixels).split([len(row) for row in ids])
    flat, cu = packed(ids)
    x = ours.embed(flat, pixels).split(cu.diff().tolist())
    untils = ours.until(flat, cu).split(cu.diff().tolist())
    plans = [pieces(row, most) for row in ids]
    caches = ours.new_caches(len(ids), 40)
    for step in range(max(map(len, plans))):
        now = [plan[step] if step < len(plan) else (0, 0) for plan in plans]
        part, cu = packed([row[a:b] for row, (a, b) in zip(x, now, strict=True)])
        until = torch.cat([row[a:b] for row, (a, b) in zip(untils, now, strict=True)])
        out = ours.extend(part, caches.chunk(cu, until), caches).split(cu.diff().tolist())
        for g, e, (a, b) in zip(out, expected, now, strict=True):
            if b > a:
                close(ours.logits(g), e[a:b])


@torch.no_grad()
def test_answers(models):
    """Token by token behind prompts of different lengths, until the rings have wrapped several times."""
    ours, theirs = models
    ids, pixels = prompt([((2,), 28), ((), 24)])
    expected = their_logits(theirs, ids, pixels).split([28, 24])
    starts = (13, 9)
    flat, cu = packed([row[:s] for row, s in zip(ids, starts, strict=True)])
    caches = ours.new_caches(2, 40)
    ours.extend(ours.embed(flat, pixels), caches.chunk(cu, ours.until(flat, cu)), caches)
    for step in range(15):
        tokens = torch.stack([row[s + step] for row, s in zip(ids, starts, strict=True)])
        got = ours.logits(ours.extend(ours.embed(tokens), caches.step(), caches))
        close(got, torch.stack([e[s + step] for e, s in zip(expected, starts, strict=True)]))


def test_golden_projection():
    golden = Golden("gemma3_vision_projection")
    c = golden.config
    projector = Projector(c["vision_dim"], c["width"], c["output_length"])
    root = "params/embedder/"
    projector.load_state_dict(
        {
            "mm_input_projection_weight": golden[f"{root}mm_input_projection/w"],
            "mm_soft_emb_norm.weight": golden[f"{root}mm_soft_embedding_norm/scale"],
        }
    )
    assert_close(projector.pool(golden["in/soft_tokens"]), golden["out/pooled"], 2e-5)
    assert_close(projector(golden["in/soft_tokens"]), golden["out/projected"], 2e-5)


def test_pooling_is_the_mean_of_blocks():
    """4096 patches, row by row, to 256 blocks of 4 x 4."""
    x = torch.arange(4096.0)[None, :, None]
    pooled = Projector(1, 1, 256).pool(x)[0, :, 0]
    rows, columns = torch.meshgrid(torch.arange(16) * 4, torch.arange(16) * 4, indexing="ij")
    assert torch.equal(pooled, ((rows + 1.5) * 64 + columns + 1.5).flatten())


def test_until():
    model = Gemma3(GEMMA3)
    ids = torch.tensor([5, 62, 62, 62, 7, 62, 62, 62, 62, 8])
    cu = torch.tensor([0, 4, 4, 7, 10], dtype=torch.int32)
    assert model.until(ids, cu).tolist() == [0, 3, 3, 3, 0, 2, 2, 1, 1, 2]
    assert model.until(ids[:0], torch.tensor([0, 0], dtype=torch.int32)).tolist() == []
    with pytest.raises(ValueError, match="prefix must be None"):
        model.until(ids, cu, torch.tensor([0, 0, 0, 0]))


def test_compiled_and_without_data():
    """Placeholders are filled and blocks found in one graph, and on the meta device: nothing looks at values."""
    c = replace(GEMMA3, vision=replace(GEMMA3.vision, depth=1))
    model = Gemma3(c)
    ids, pixels = prompt([((3,), 20)])
    cu = torch.tensor([0, 20], dtype=torch.int32)
    call = torch.compile(
        lambda ids, pixels: (model.embed(ids, pixels), model.until(ids, cu)), backend="eager", fullgraph=True
    )
    with torch.no_grad():
        x, until = call(ids[0], pixels)
        assert torch.equal(x, model.embed(ids[0], pixels))
        assert torch.equal(until, model.until(ids[0], cu))
    with torch.device("meta"):
        assert Gemma3(c)(ids[0][None].to("meta"), pixels.to("meta")).shape == (1, 20, 64)


@pytest.mark.parametrize("tokens", [0, 8, 16, -9, 9.0])
def test_bad_configurations(tokens):
    with pytest.raises(ValueError, match="image_tokens must be a square number whose root divides"):
        replace(GEMMA3, image_tokens=tokens)


def test_bad_input():
    model = Gemma3(GEMMA3)
    ids, pixels = prompt([((1,), 12)])
    with pytest.raises(ValueError, match=r"9 placeholders \(62\) for each of the 2 images, got 9 in all"):
        model.embed(ids[0], torch.cat([pixels, pixels]))
    with pytest.raises(ValueError, match="each of the 1 images, got 8 in all"):
        model.embed(ids[0][2:], pixels)


def test_examples():
    found = doctest.testmod(gemma3, extraglobs={"torch": torch, "vlkern": vlkern})
    assert found.attempted > 5
    assert not found.failed

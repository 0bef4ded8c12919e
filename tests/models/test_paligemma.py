"""PaliGemma 1 and 2 against transformers: whole rows, gradients, caches, rows of any lengths; and bad input."""

import doctest
from dataclasses import replace

import pytest
import torch
from multimodal_peers import GEMMA3, PALIGEMMA, VISION, pair, same_gradients

import vlkern.models
from vlkern.data import Prompt
from vlkern.generation import generate
from vlkern.models import create, paligemma
from vlkern.models.gemma import GemmaConfig
from vlkern.models.paligemma import PRESETS, PaliGemma, PaliGemmaConfig

I = VISION.patches  # noqa: E741 image tokens of one picture
#: Tokens of the question and of the answer in each row, pictures of each row.
ROWS = ((14, 6, 1), (24, 3, 2), (11, 9, 1))


def prompt(rows, seed=0):
    """ids of each row, pixels of all, and the tokens of the prefixes."""
    g = torch.Generator().manual_seed(seed)
    ids = []
    for prefix, suffix, images in rows:
        row = torch.randint(2, 60, (prefix + suffix,), generator=g)
        row[: images * I] = 60
        ids.append(row)
    pixels = torch.rand(sum(images for *_, images in rows), 3, 21, 21, generator=g) * 2 - 1
    return ids, pixels, torch.tensor([prefix for prefix, *_ in rows])


def packed(ids):
    lengths = torch.tensor([len(row) for row in ids], dtype=torch.int32)
    return torch.cat(ids), torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def their_logits(model, ids, pixels, prefix):
    """Row by row: their padding does not matter then."""
    out = []
    for row, p in zip(ids, prefix.tolist(), strict=True):
        count = int((row == 60).sum()) // I
        types = (torch.arange(len(row)) >= p).long()[None]
        out.append(model(input_ids=row[None], pixel_values=pixels[:count], token_type_ids=types).logits[0])
        pixels = pixels[count:]
    return torch.cat(out)


@pytest.fixture(scope="module", params=PALIGEMMA)
def models(request):
    return pair(PALIGEMMA[request.param])


def close(got, expected, tolerance=1e-5):
    assert got.shape == expected.shape
    assert float((got - expected).detach().abs().max()) <= tolerance * float(expected.detach().abs().max())


def test_packed_rows_and_gradients(models):
    """Rows of any lengths in one batch, two pictures in one of them: logits, and the gradient of every parameter."""
    ours, theirs = models
    ids, pixels, prefix = prompt(ROWS)
    flat, cu = packed(ids)
    for model in models:
        model.zero_grad()
    hidden = ours.hidden(ours.embed(flat, pixels), cu, until=ours.until(flat, cu, prefix))
    got, expected = ours.logits(hidden), their_logits(theirs, ids, pixels, prefix)
    close(got, expected)
    same_gradients(ours, theirs, got, expected)


@torch.no_grad()
def test_forward(models):
    ours, theirs = models
    ids, pixels, prefix = prompt([(14, 6, 1), (11, 9, 1)])
    expected = their_logits(theirs, ids, pixels, prefix).unflatten(0, (2, 20))
    close(ours(torch.stack(ids), pixels, prefix), expected)
    close(
        ours(torch.stack(ids), pixels), their_logits(theirs, ids, pixels, torch.tensor([20, 20])).unflatten(0, (2, 20))
    )


@torch.no_grad()
@pytest.mark.parametrize("cut", [1, 4])
def test_caches(models, cut):
    """The prefix at once, then the answer in pieces: the same logits at every step as the whole rows of theirs."""
    ours, theirs = models
    ids, pixels, prefix = prompt(ROWS)
    expected = their_logits(theirs, ids, pixels, prefix).split([len(row) for row in ids])
    question = [row[:p] for row, p in zip(ids, prefix.tolist(), strict=True)]
    flat, cu = packed(question)
    caches = ours.new_caches(len(ids), 40)
    chunk = caches.chunk(cu, ours.until(flat, cu))
    got = [ours.logits(part) for part in ours.extend(ours.embed(flat, pixels), chunk, caches).split(cu.diff().tolist())]
    for row, (g, e, p) in enumerate(zip(got, expected, prefix.tolist(), strict=True)):
        close(g, e[:p])
        assert int(caches.length[row]) == p
    rest = [row[p:] for row, p in zip(ids, prefix.tolist(), strict=True)]
    done = 0
    while any(len(row) > done for row in rest):
        pieces = [row[done : done + cut] for row in rest]
        flat, cu = packed(pieces)
        out = ours.extend(ours.embed(flat), caches.chunk(cu), caches).split(cu.diff().tolist())
        for g, e, p, piece in zip(out, expected, prefix.tolist(), pieces, strict=True):
            close(ours.logits(g), e[p + done : p + done + len(piece)]) if len(piece) else None
        done += cut


@torch.no_grad()
def test_an_answer_chunk_beside_a_question(models):
    """One row is prefilled while another already answers: its tokens stay causal, and inside the window."""
    ours, theirs = models
    ids, pixels, prefix = prompt([(13, 6, 1), (20, 6, 2)])
    expected = their_logits(theirs, ids, pixels, prefix).split([19, 26])
    caches = ours.new_caches(2, 40)
    one, cu = packed([ids[0][:13], ids[1][:0]])
    ours.extend(ours.embed(one, pixels[:1]), caches.chunk(cu, ours.until(one, cu)), caches)
    both, cu = packed([ids[0][13:], ids[1]])
    until = ours.until(both, cu, torch.tensor([0, 20])) + torch.tensor([13, 0], dtype=torch.int32).repeat_interleave(
        cu.diff()
    )
    got = ours.logits(ours.extend(ours.embed(both, pixels[1:]), caches.chunk(cu, until), caches))
    close(got, torch.cat([expected[0][13:], expected[1]]))


def test_greedy_answers(models):
    """Generation in one batch against theirs one by one; ids that only pad the table are not drawn."""
    ours, theirs = models
    ids, pixels, _ = prompt([(14, 0, 1), (24, 0, 2)], seed=1)
    prompts = [Prompt(tuple(row.tolist()), p, len(row)) for row, p in zip(ids, pixels.split([1, 2]), strict=True)]
    answers = generate(ours, prompts, max_new_tokens=12)
    for one, answer in zip(prompts, answers, strict=True):
        row = torch.tensor([one.ids])
        expected = theirs.generate(
            input_ids=row, pixel_values=one.pixels, token_type_ids=torch.zeros_like(row), max_new_tokens=12,
            attention_mask=torch.ones_like(row), do_sample=False, suppress_tokens=[60, 61, 62, 63], eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
        assert list(answer.tokens) == expected[0, len(one.ids) :].tolist()


@torch.no_grad()
def test_bfloat16():
    """No worse than theirs, by the error against float64."""
    ours, theirs = pair(PALIGEMMA["gemma2"])
    ids, pixels, prefix = prompt(ROWS)
    exact = their_logits(theirs.double(), ids, pixels.double(), prefix)
    low = their_logits(theirs.bfloat16(), ids, pixels.bfloat16(), prefix)
    ours, (flat, cu) = ours.bfloat16(), packed(ids)
    got = ours.logits(ours.hidden(ours.embed(flat, pixels), cu, until=ours.until(flat, cu, prefix)))
    assert got.dtype == torch.float32
    assert (got - exact).square().mean().sqrt() <= 1.5 * (low - exact).square().mean().sqrt()


@torch.no_grad()
def test_image_tokens_are_not_scaled():
    model = PaliGemma(PALIGEMMA["gemma"])
    ids, pixels, _ = prompt([(12, 2, 1)])
    x = model.embed(ids[0], pixels)
    assert not x[:I].any()  # the projector starts at zero
    assert torch.equal(x[I:], model.language.model.embed_tokens.weight[ids[0][I:]] * torch.tensor(24**0.5))
    model.projector.linear.bias.fill_(0.5)
    assert bool((model.embed(ids[0], pixels)[:I] == 0.5).all())


def test_prefix_sees_the_question():
    """An image token's vector depends on the question and not on the answer; a padded table is not needed."""
    c = PALIGEMMA["gemma2"]
    model = PaliGemma(replace(c, language=replace(c.language, vocabulary=60)))
    ids, pixels, prefix = prompt([(14, 6, 1)])
    x = model.embed(ids[0], pixels).detach().requires_grad_()
    cu = torch.tensor([0, 20], dtype=torch.int32)
    model.hidden(x, cu, until=model.until(ids[0], cu, prefix))[0].sum().backward()
    seen = x.grad.abs().sum(1) > 0
    assert seen[:14].all()
    assert not seen[14:].any()


def test_until():
    model = create("paligemma-tiny")
    cu = torch.tensor([0, 5, 5, 8], dtype=torch.int32)
    ids = torch.zeros(8, dtype=torch.int64)
    assert model.until(ids, cu).tolist() == [4] * 5 + [2] * 3
    assert model.until(ids, cu, torch.tensor([3, 0, 0])).tolist() == [2, 2, 2, 3, 4, 0, 1, 2]
    with pytest.raises(ValueError, match=r"prefix must be at most the row's length, 0, got prefix\[1\] = 1"):
        model.until(ids, cu, torch.tensor([3, 1, 0]))
    with pytest.raises(TypeError, match="prefix must be int32 or int64"):
        model.until(ids, cu, torch.tensor([3.0, 1, 0]))
    with pytest.raises(ValueError, match="prefix must have shape"):
        model.until(ids, cu, torch.tensor([3, 1]))


def test_bad_input():
    model = PaliGemma(PALIGEMMA["gemma"])
    ids, pixels, _ = prompt([(14, 6, 1)])
    with pytest.raises(ValueError, match=r"9 placeholders \(60\) for each of the 2 images, got 9 in all"):
        model.embed(ids[0], torch.cat([pixels, pixels]))
    with pytest.raises(ValueError, match="each of the 0 images, got 9 in all"):
        model.embed(ids[0])
    with pytest.raises(ValueError, match=r"pixels must have shape \[B, 3, 21, 21\]"):
        model.embed(ids[0], pixels[:, :, :20])
    with pytest.raises(ValueError, match=r"ids must have shape \[T\]"):
        model.embed(ids[0][None], pixels)
    with pytest.raises(ValueError, match=r"ids must have shape \[B, L\]"):
        model(ids[0], pixels)
    with pytest.raises(ValueError, match="ids must be from 0 to 63, got 64"):
        model.embed(torch.tensor([64]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_token": 59}, "image_token must not be a token that is drawn, below 60, got 59"),
        ({"sampled_vocabulary": 65}, "sampled_vocabulary must be at most the vocabulary, 64, got 65"),
        ({"sampled_vocabulary": 0}, "sampled_vocabulary must be a positive integer, got 0"),
        ({"image_token": True}, "image_token must be a positive integer, got True"),
    ],
)
def test_bad_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        replace(PALIGEMMA["gemma"], **change)


def test_for_vocabulary():
    c = PRESETS["paligemma-3b-224"]
    assert (c.language.vocabulary, c.image_token, c.sampled_vocabulary) == (257_216, 257_152, 257_152)
    small = c.for_vocabulary(100)
    assert (small.language.vocabulary, small.image_token, small.sampled_vocabulary) == (128, 100, 100)
    assert isinstance(small, PaliGemmaConfig)
    assert isinstance(small.language, GemmaConfig)
    assert GEMMA3.image_tokens == 9


def test_examples():
    found = doctest.testmod(paligemma, extraglobs={"torch": torch, "vlkern": vlkern})
    assert found.attempted > 5
    assert not found.failed

"""vlkern.masks against the papers' own masks (golden arrays) and against transformers, on the valid tokens.

Padding is removed before packing: the valid tokens of all rows of a batch lie side by side, one document per row.
Rows of invalid queries have no counterpart here.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_masks import dense

from vlkern import masks

GOLDEN = Path(__file__).parent / "golden"
PALIGEMMA = np.load(GOLDEN / "paligemma_masks.npz")
GEMMA = np.load(GOLDEN / "gemma_masks.npz")


def packed(theirs, valid):
    """[B, L, L] and valid [B, L] -> block-diagonal [tokens, tokens] of the valid ones, and their cu_seqlens."""
    blocks = [mask[v][:, v] for mask, v in zip(theirs, valid, strict=True)]
    cu = torch.tensor([0, *np.cumsum([len(block) for block in blocks])], dtype=torch.int32)
    return torch.block_diag(*blocks).bool(), cu


def runs(flags):
    """starts and stops of the runs of True in a vector."""
    edges = np.diff(np.concatenate([[False], flags, [False]]).astype(int))
    return (torch.tensor(np.flatnonzero(edges == sign), dtype=torch.int32) for sign in (1, -1))


def image_spans(images, valid):
    """Spans of the image tokens in the packed batch; a run never crosses two rows."""
    starts, stops, offset = [], [], 0
    for row, v in zip(images, valid, strict=True):
        a, b = runs(row[v])
        starts, stops, offset = [*starts, a + offset], [*stops, b + offset], offset + int(v.sum())
    return masks.spans(torch.cat(starts), torch.cat(stops))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_paligemma_groups(number):
    """mask_ar: a query sees a key iff cumsum(mask_ar)[key] <= cumsum(mask_ar)[query]: tokens of one sum are a group."""
    valid = PALIGEMMA[f"in/input_mask{number}"]
    theirs, cu = packed(torch.tensor(PALIGEMMA[f"out/attn_mask{number}"]), valid)
    sums = [ar.cumsum()[v] for ar, v in zip(PALIGEMMA[f"in/mask_ar{number}"], valid, strict=True)]
    sizes = np.concatenate([np.unique(s, return_counts=True)[1] for s in sums])
    assert theirs.shape[0] > 3
    assert torch.equal(dense(masks.documents(cu) & masks.groups(torch.tensor(sizes)), len(theirs)), theirs)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_paligemma_alignment_only_moves_padding(number):
    """The same mask after the roll that right-aligns left-aligned tokens, for decoding."""
    before, after = (PALIGEMMA[f"{where}/align_mask{number}"] for where in ("in", "out"))
    rolled = torch.tensor(PALIGEMMA[f"out/align_attn{number}"])
    theirs, cu = packed(rolled, after)
    ar = PALIGEMMA[f"in/mask_ar{number}"]
    sums = [a.cumsum()[v] for a, v in zip(ar, before, strict=True)]
    sizes = np.concatenate([np.unique(s, return_counts=True)[1] for s in sums])
    input_mask = [row[v] for row, v in zip(PALIGEMMA[f"in/input_mask{number}"], before, strict=True)]
    keep = torch.tensor(np.concatenate(input_mask))  # rolled masks were made with input_mask, whose holes stay holes
    ours = dense(masks.documents(cu) & masks.groups(torch.tensor(sizes)), len(theirs))
    assert torch.equal(ours[keep][:, keep], theirs[keep][:, keep])


@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("name", ["gemma2_sliding", "gemma3_text", "gemma3_scaled_bidir"])
def test_gemma(name, window):
    """Global layers: causal or inside one image. Local layers: and |position difference| < window."""
    valid = GEMMA[f"{name}/in/input_mask"]
    theirs = torch.tensor(GEMMA[f"{name}/out/attn_mask"])
    positions = torch.tensor(GEMMA[f"{name}/out/positions"])
    mask = masks.causal() | image_spans(GEMMA[f"{name}/in/bidirectional_mask"], valid)
    if window:
        width = json.loads(str(GEMMA[f"{name}/config"]))["sliding_window"]
        theirs = theirs & ((positions[:, :, None] - positions[:, None]).abs() < width)
        mask = mask & masks.window(width, width)
    theirs, cu = packed(theirs, valid)
    assert torch.equal(dense(masks.documents(cu) & mask, len(theirs)), theirs)
    i = torch.arange(len(theirs)) - cu[:-1].long().repeat_interleave(cu.diff())
    assert torch.equal(i, torch.cat([p[v] for p, v in zip(positions, torch.tensor(valid), strict=True)]))


def batch(seed):
    """token types (1 = image) of rows of different lengths, their validity, padded on the left or on the right."""
    r = np.random.default_rng(seed)
    B, L = 3, 40
    types, valid = np.zeros((B, L), np.int64), np.zeros((B, L), bool)
    for b in range(B):
        n = L if b == 0 else int(r.integers(8, L))
        row = np.zeros(n, np.int64)
        for start in (2, 15, 27):  # blocks longer and shorter than the window
            row[start : start + int(r.integers(1, 11))] = 1
        where = slice(L - n, L) if seed % 2 else slice(0, n)
        types[b, where], valid[b, where] = row, True
    return torch.tensor(types), torch.tensor(valid)


def config(name, **options):
    transformers = pytest.importorskip("transformers")
    options = {"num_hidden_layers": 2, "hidden_size": 8, "attn_implementation": "eager"} | options
    return getattr(transformers, name)(**options)


def visible(mask, B, L):
    """transformers' additive mask [B, 1, L, L] -> bool [B, L, L]."""
    assert mask.shape == (B, 1, L, L) and mask.dtype == torch.float32
    return mask[:, 0] == 0


@pytest.mark.parametrize("window", [3, 7, 64])
@pytest.mark.parametrize("seed", range(4))
def test_transformers_gemma3(seed, window):
    gemma3 = pytest.importorskip("transformers.models.gemma3.modeling_gemma3")
    types, valid = batch(seed)
    theirs = gemma3.create_masks_for_vision_model(
        config("Gemma3TextConfig", sliding_window=window),
        torch.zeros(*types.shape, 8),
        valid.long(),
        None,
        (valid.cumsum(1) - 1).clamp(min=0),
        gemma3.get_block_sequence_ids_for_mask(types),
    )
    causal_or_image = masks.causal() | image_spans((types == 1).numpy(), valid.numpy())
    for layer, mask in (
        ("full_attention", causal_or_image),
        ("sliding_attention", causal_or_image & masks.window(window)),
    ):
        expected, cu = packed(visible(theirs[layer], *types.shape), valid)
        assert torch.equal(dense(masks.documents(cu) & mask, len(expected)), expected), layer


@pytest.mark.parametrize("seed", range(4))
def test_transformers_paligemma(seed):
    """Image, prefix and separator are one block, the suffix is causal; PaliGemma 2 has sliding layers besides."""
    masking = pytest.importorskip("transformers.masking_utils")
    _, valid = batch(seed)
    lengths = [int(n) // 3 for n in valid.sum(1)]
    block = torch.full_like(valid, -1, dtype=torch.int64)
    for b, n in enumerate(lengths):
        first = int(valid[b].int().argmax())
        block[b, first : first + n] = 0
    c = config("Gemma2Config", sliding_window=6)
    arguments = {
        "config": c,
        "inputs_embeds": torch.zeros(*valid.shape, 8),
        "attention_mask": valid.long(),
        "past_key_values": None,
        "position_ids": None,
        "block_sequence_ids": block,
    }
    expected, cu = packed(visible(masking.create_causal_mask(**arguments), *valid.shape), valid)
    documents, n = masks.documents(cu), len(expected)
    assert torch.equal(dense(documents & (masks.causal() | masks.prefix(torch.tensor(lengths))), n), expected)
    sliding, _ = packed(visible(masking.create_sliding_window_causal_mask(**arguments), *valid.shape), valid)
    prefixes = masks.spans(cu[:-1], cu[:-1] + torch.tensor(lengths, dtype=torch.int32))
    assert torch.equal(dense(documents & (masks.causal() & masks.window(6) | prefixes), n), sliding)


def test_transformers_packed_positions():
    """transformers finds packed documents by positions that start again; the mask is documents & causal (& window)."""
    masking = pytest.importorskip("transformers.masking_utils")
    cu = torch.tensor([0, 5, 6, 14], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in cu.diff().tolist()])[None]
    arguments = (config("Gemma2Config", sliding_window=3), torch.zeros(1, 14, 8), None, None, positions)
    for theirs, mask in (
        (masking.create_causal_mask(*arguments), masks.causal()),
        (masking.create_sliding_window_causal_mask(*arguments), masks.causal() & masks.window(3)),
    ):
        assert torch.equal(dense(masks.documents(cu) & mask, 14), visible(theirs, 1, 14)[0])

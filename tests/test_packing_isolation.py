"""The leak detector finds leaks of every kind, and only leaks."""

import doctest

import pytest
import torch
import torch.nn.functional as F

from vlkern import masks, ops
from vlkern.models import naflex, navit
from vlkern.packing import Example, IsolationError, PackedBatch, check_isolation, isolation


def pack(*lengths):
    torch.manual_seed(0)
    examples = [
        Example(
            {"x": torch.randn(n, 8), "ids": torch.randint(5, (n,))},
            parts={"patches": [torch.randn(2, 8)] * (i % 2 + 1)},
        )
        for i, n in enumerate(lengths)
    ]
    return PackedBatch.of(examples)


def attend(b, mask):
    x = b.tokens["x"][:, None]
    return ops.interval_attention(x, x, x, *mask.bounds(b.total))[:, 0]


def leaks(model, b, **options):
    with pytest.raises(IsolationError) as caught:
        check_isolation(model, b, **options)
    return [(leak.changed, leak.seen_in) for leak in caught.value.leaks]


def test_attention_inside_documents_is_isolated():
    b = pack(5, 1, 7, 3)
    documents = masks.documents(b.cu_seqlens)
    check_isolation(lambda b: attend(b, documents), b)
    check_isolation(lambda b: {"a": attend(b, documents & masks.causal()), "b": [b.tokens["ids"] + 1]}, b)


def test_a_forgotten_mask():
    b = pack(5, 1, 7, 3)
    assert leaks(lambda b: attend(b, masks.causal()), b) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    # Document 1 reaches the first token of document 2 only.
    shifted = masks.documents(b.cu_seqlens) | masks.causal() & masks.window(2)
    assert leaks(lambda b: attend(b, shifted), b) == [(0, 1), (1, 2), (2, 3)]


def test_a_boundary_off_by_one():
    """Seen in one pair of documents, and in one token alone."""
    b = pack(5, 4, 7)
    wrong = torch.tensor([0, 6, 9, 16], dtype=torch.int32)
    assert leaks(lambda b: attend(b, masks.documents(wrong)), b) == [(0, 1), (1, 0)]


def pictures(*grids):
    """Pictures of h x w patches of 4 x 4 pixels, as a packed batch with rows, columns and sides."""
    torch.manual_seed(0)
    return PackedBatch.of(
        [
            Example(
                {"patches": torch.randn(h * w, 48), "yx": torch.cartesian_prod(torch.arange(h), torch.arange(w))},
                values={"hw": torch.tensor([h, w])},
            )
            for h, w in grids
        ]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_encoders_of_packed_pictures_are_isolated(dtype):
    """Tokens and pooled vectors, to the last bit on the CPU."""
    b = pictures((3, 5), (1, 1), (6, 2), (4, 4))
    size = {"width": 32, "depth": 2, "heads": 2, "mlp": 64, "patch": 4}
    ours = navit.VisionTower(navit.VisionConfig(**size)).to(dtype)
    theirs = naflex.NaflexVisionTower(naflex.NaflexVisionConfig(**size, side=4)).to(dtype)

    def model(b):
        where = b.tokens["patches"].to(dtype), b.cu_seqlens, b.tokens["yx"], b.values["hw"]
        shapes = where[0], b.values["hw"]
        return ours(*where), ours.tokens(*where), theirs(*shapes), theirs.tokens(*shapes)

    check_isolation(model, b, fields=["patches"])


@pytest.mark.parametrize("field", ["x", "ids", "patches"])
def test_leaks_of_every_field(field):
    b = pack(3, 4, 2)

    def model(b):
        everything = {"x": b.tokens["x"], "ids": b.tokens["ids"].float(), "patches": b.parts["patches"].values}
        return b.tokens["x"].sum(1) + everything[field].mean()

    every_pair = [(d, e) for d in range(3) for e in range(3) if d != e]
    assert leaks(model, b) == every_pair
    others = {"x", "ids", "patches"} - {field}
    if field != "x":
        check_isolation(model, b, fields=sorted(others))


def test_outputs_per_document():
    b = pack(3, 4, 2)

    def pooled(b):
        return torch.stack([x.mean(0) for x in b.split(b.tokens["x"])])

    check_isolation(pooled, b)
    assert leaks(lambda b: F.normalize(pooled(b), dim=0), b)  # over the wrong dimension
    assert len(leaks(lambda b: (pooled(b), pooled(b).cumsum(0)), b)) == 3


def test_tolerance():
    b = pack(3, 4)

    def model(b):
        return b.tokens["x"] + 1e-5 * b.tokens["x"].mean()

    assert leaks(model, b) == [(0, 1), (1, 0)]
    assert leaks(model, b, tolerance=1e-9)
    check_isolation(model, b, tolerance=1e-3)


def test_nan_that_spreads_is_a_leak_and_nan_that_stays_is_none():
    b = pack(3, 4)

    def spreads(b):
        x = b.tokens["x"].clone()
        x[:, 0] = torch.where(x[0, 0] == b_first, x[:, 0], torch.nan)
        return x

    b_first = b.tokens["x"][0, 0].clone()
    assert leaks(spreads, b) == [(0, 1)]
    check_isolation(lambda b: torch.cat([b.tokens["x"], torch.full((7, 1), torch.nan)], 1), b)


def test_the_message_names_the_documents():
    with pytest.raises(IsolationError) as caught:
        check_isolation(lambda b: b.tokens["x"].cumsum(0), pack(3, 4, 2))
    first, *rest = str(caught.value).splitlines()
    assert first == "documents leak into each other, 3 of the pairs among 3:"
    assert [line.split(" (by")[0] for line in rest] == [
        "changing document 0 changes 1, 2",
        "changing document 1 changes 2",
    ]


BAD = [
    (lambda b: b.tokens["x"], (3,), {}, "batch must hold at least two documents, got 1"),
    (
        lambda b: b.tokens["x"],
        (3, 2),
        {"fields": ["y"]},
        r"fields must be among \['ids', 'patches', 'x'\], got \['y'\]",
    ),
    (lambda b: b.tokens["x"].mean(), (3, 4), {}, r"model must give \[7, ...\] or \[2, ...\], .* got \[\]"),
    (lambda b: b.tokens["x"][1:], (3, 4), {}, r"got \[6, 8\]"),
    (lambda b: None, (3, 4), {}, "got NoneType"),
    (lambda b: F.dropout(b.tokens["x"]), (3, 4), {}, "model must be deterministic"),
    (lambda b: torch.zeros(7), (3, 4), {}, "changing document 0 moved none of its outputs"),
    (lambda b: b.tokens["x"], (3, 4), {"fields": ["ids"]}, "changing document 0 moved none of its outputs"),
]


@pytest.mark.parametrize(("model", "lengths", "options", "message"), BAD)
def test_a_check_that_proves_nothing_is_refused(model, lengths, options, message):
    with pytest.raises(ValueError, match=message):
        check_isolation(model, pack(*lengths), **options)


def test_the_batch_stays_as_it_was():
    b = pack(3, 4)
    before = b.map(torch.clone)
    check_isolation(lambda b: b.tokens["x"], b)
    assert torch.equal(b.tokens["x"], before.tokens["x"]) and torch.equal(b.tokens["ids"], before.tokens["ids"])


def test_the_example_of_the_docstring():
    failed, tried = doctest.testmod(
        isolation, extraglobs={"Example": Example}, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    )
    assert tried == 3 and failed == 0

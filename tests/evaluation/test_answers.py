"""What `vlkern eval paligemma` counts."""

import json

import pytest
import shards

from vlkern import data
from vlkern.boxes import Detection
from vlkern.evaluation.answers import Questions, found, iou
from vlkern.models.paligemma import PRESETS, PaliGemma

NUMBERS = range(8)


def test_iou():
    whole = (0.0, 0.0, 1.0, 1.0)
    assert iou(whole, whole) == 1 and iou(whole, (0.0, 0.0, 0.5, 0.5)) == 0.25
    assert iou((0.0, 0.0, 0.5, 0.5), (0.5, 0.5, 1.0, 1.0)) == 0
    assert iou((0.0, 0.0, 0.5, 1.0), (0.25, 0.0, 0.75, 1.0)) == pytest.approx(1 / 3)
    assert iou((0.5, 0.5, 0.5, 0.5), (0.5, 0.5, 0.5, 0.5)) == 0


def test_each_box_counts_once():
    near, exact, other = (Detection(box) for box in ((0, 0, 0.5, 0.4), (0, 0, 0.5, 0.5), (0.5, 0.5, 1, 1)))
    assert found([exact], [near, exact, other]) == [exact]  # the best one
    assert found([exact, exact], [near]) == [near, None]
    assert found([other, exact], [near, other]) == [other, near]
    assert found([exact], []) == [None] and found([], [exact]) == []


@pytest.fixture
def questions(tmp_path):
    members = {}
    for i in NUMBERS:
        record = {"captions": [f"picture {i}"], "category": "Even" if i % 2 == 0 else "odd/very"}
        if i == 7:
            del record["category"]
        members[f"{i}.png"] = shards.picture((30 * i, 200, 90)) if i != 2 else b"nothing"
        members[f"{i}.json"] = json.dumps(record).encode()
    pairs = data.PairShards(shards.write(tmp_path / "test.tar", members), 64)
    model = PaliGemma(PRESETS["paligemma-tiny"])
    return Questions(model, data.load_vocabulary("bytes"), data.Tasks(pairs, 64), batch=3)


def test_right_answers(questions, monkeypatch):
    monkeypatch.setattr(questions, "answers", lambda kind, examples: [example.suffix for example in examples])
    result = questions.category(NUMBERS)
    # Number 2 cannot be read, number 7 has no class.
    assert (result["pictures"], result["classes"], result["accuracy"]) == (6, 2, 1)
    assert result["chance"] == 0.5 and result["by_class"]["odd"] == {"pictures": 3, "accuracy": 1}
    assert list(questions.skipped) == [2]
    boxes = questions.boxes(NUMBERS)
    assert boxes["found"] == boxes["named"] == 1 and boxes["answered"] == boxes["objects"] and boxes["chance"] < 0.5


def test_wrong_answers(questions, monkeypatch):
    monkeypatch.setattr(
        questions, "answers", lambda kind, examples: [e.suffix.replace("odd", "even") for e in examples]
    )
    result = questions.category(NUMBERS)
    assert result["accuracy"] == result["mean_over_classes"] == 0.5
    boxes = questions.boxes(NUMBERS)
    assert boxes["found"] == 1 and 0 < boxes["named"] < 1
    monkeypatch.setattr(questions, "answers", lambda kind, examples: ["<loc0001> thing"] * len(examples))
    assert questions.boxes(NUMBERS)["found"] == 0 == questions.category(NUMBERS)["accuracy"]


def test_caption_tokens(questions, monkeypatch):
    """An untrained model is asked about each token, its end included."""
    result = questions.caption(NUMBERS)
    tokens = [token for i in NUMBERS if i != 2 for token in [*questions._vocabulary.encode(f"picture {i}"), 1]]
    assert result["tokens"] == len(tokens) and 0 <= result["accuracy"] < 0.5
    assert result["chance"] == max(map(tokens.count, tokens)) / len(tokens)

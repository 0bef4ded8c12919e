import json
from pathlib import Path

import numpy as np
import pytest
import torch

from vlkern.errors import UserError
from vlkern.evaluation import TEMPLATES, Classification, canonical, class_embeddings, classify, prompts
from vlkern.evaluation.zeroshot import load_classes, load_templates, numbered

GOLDEN = Path(__file__).parents[1] / "golden" / "image_text_eval.npz"


def test_papers_code():
    file = np.load(GOLDEN)
    data = {name: torch.from_numpy(file[name]) for name in file.files if name.startswith(("in/", "out/"))}
    centres = class_embeddings(data["in/class_text_emb"], data["in/class_text_label"], 9)
    torch.testing.assert_close(centres, data["out/class_embeddings"], rtol=0, atol=1e-6)
    torch.testing.assert_close(data["in/image_emb"] @ centres.T, data["out/zero_shot_logits"], rtol=0, atol=1e-6)
    top = classify(data["in/image_emb"], centres, 5, block=7)
    assert top[:, 0].tolist() == data["out/zero_shot_pred"].tolist()

    used = data["in/mask"].nonzero().squeeze(1).tolist()
    assert len(used) == data["out/count"].item()
    single = [frozenset([data["in/image_label"][i].item()]) for i in used]
    several = [frozenset(label for label in data["in/image_multilabel"][i].tolist() if label >= 0) for i in used]
    for labels, name in ((single, "out/correct_single"), (several, "out/correct_multi")):
        outcome = Classification(range(9), labels, top[used])
        assert outcome.hits(1).sum().item() == data[name].item()


@pytest.mark.parametrize(
    ("text", "keep", "expected"),
    [
        ("  A_Photo,  of: THE cat's {}! ", "{}", "a photo of the cats {}"),
        ("a {b} {}", "{}", "a b {}"),
        ("tench, Tinca tinca", ",", "tench, tinca tinca"),
        ("tench, Tinca tinca", "", "tench tinca tinca"),
        ("Ärger\tim  Zoo…", "", "ärger im zoo…"),  # only ASCII punctuation goes
        ("...", "", ""),
    ],
)
def test_canonical(text, keep, expected):
    assert canonical(text, keep) == expected


def test_prompts():
    assert prompts("Traffic_Light", TEMPLATES["photo"]) == [
        "traffic light",
        "a photo of a traffic light",
        "a photo of the traffic light",
    ]
    assert prompts("a {} b", ["{}."]) == ["a b"]  # braces of a name are punctuation
    assert len(set(prompts("cat", TEMPLATES["clip_best"]))) == 8


def test_counts_by_hand():
    top = torch.tensor([[0, 1], [1, 0], [2, 1], [0, 2], [1, 0]])
    labels = [frozenset({0}), frozenset({0}), frozenset({0, 1}), frozenset({2}), frozenset({2})]
    outcome = Classification(["a", "b", "c", "unused"], labels, top)
    assert outcome.hits(1).tolist() == [True, False, False, False, False]
    assert outcome.hits(2).tolist() == [True, True, True, True, False]
    assert (outcome.accuracy(1), outcome.accuracy(2)) == (0.2, 0.8)
    assert outcome.by_class(1) == {0: (3, 1 / 3), 1: (1, 0.0), 2: (2, 0.0)}
    assert outcome.by_class(2) == {0: (3, 1.0), 1: (1, 1.0), 2: (2, 0.5)}
    assert [outcome.taken_for(label) for label in range(4)] == [1, 2, 0, None]
    assert outcome.chance(2) == 0.5
    with pytest.raises(ValueError, match="k must be 1 to 2, got 3"):
        outcome.hits(3)


def test_fewer_classes_than_k():
    assert classify(torch.eye(3), torch.eye(3), 5).shape == (3, 3)


def test_class_without_sentence():
    for label in ([0, 0, 2], [0, 1, 3]):
        with pytest.raises(ValueError, match="each of the 3 classes at least one of the 3 sentences"):
            class_embeddings(torch.eye(3), torch.tensor(label), 3)


def test_templates(tmp_path):
    assert load_templates("clip_best") == TEMPLATES["clip_best"]
    file = tmp_path / "templates.txt"
    file.write_text("a drawing of {}\n\n  {}, clip art  \n")
    assert load_templates(str(file)) == ("a drawing of {}", "{}, clip art")
    for content, message in ((b"a {} of {}\n", "txt:1: a template holds {} exactly once"), (b"\n\n", "no template")):
        file.write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_templates(str(file))
    file.write_bytes(b"\xff{}")
    for source in (str(file), str(tmp_path), "clip_bset"):
        with pytest.raises(UserError, match=r"--templates .*: expected name, photo, clip_best or a readable text file"):
            load_templates(source)


def test_classes(tmp_path):
    file = tmp_path / "classes.json"
    for content, expected in (
        ({"n01": ["tench", "Tinca tinca"], "n02": "shark"}, {"n01": ("tench", "Tinca tinca"), "n02": ("shark",)}),
        (["cat", "dog"], {"cat": ("cat",), "dog": ("dog",)}),
    ):
        file.write_text(json.dumps(content))
        assert load_classes(file) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no valid JSON"),
        ("3", "expected an object of key -> name, or a list of names"),
        ("[]", "expected an object of key -> name"),
        ('["cat", "cat"]', "'cat' is there twice"),
        ('{"a": 3}', "class 'a' needs a name or a list of names, got 3"),
        ('{"a": []}', "class 'a' needs a name"),
        ('{"a": "!?"}', "class 'a' needs a name"),
        ('{"a": ["b", 1]}', "class 'a' needs a name"),
    ],
)
def test_bad_classes(tmp_path, content, message):
    file = tmp_path / "classes.json"
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        load_classes(file)
    with pytest.raises(UserError, match="cannot be read"):
        load_classes(tmp_path / "nowhere.json")


def test_numbered():
    classes = {"a": (), "b": ()}
    assert numbered([("b",), ("a", "b")], classes) == [frozenset({1}), frozenset({0, 1})]
    with pytest.raises(UserError, match=r"pictures have 4 classes that are not among the 2 there: 'x', 'y', 'z'"):
        numbered([("a", "x", "y"), ("z", "w")], classes)

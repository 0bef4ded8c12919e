"""Classes of pictures as tokens."""

import pytest
import torch

from vlkern import data
from vlkern.errors import UserError


def _top(pairs: data.PairShards, number: int) -> str:
    return pairs.record(number)["category"].split("/")[0].replace("_", " ")


def test_classes_of_shards_and_their_numbers() -> None:
    """A class is a path up to its first slash; the folder of a run gives them back."""
    pairs = data.PairShards(data.clipart_mini() / "test.tar", 16, caption_key="category")
    classes = data.Classes.of(pairs)
    assert list(classes.names) == sorted({_top(pairs, i) for i in range(len(pairs))})
    assert classes.names[classes([pairs.record(3)["category"]]).item()] == _top(pairs, 3)


def test_classes_are_kept(tmp_path) -> None:
    classes = data.Classes(["toys and games", "food"])
    classes.save(tmp_path)
    again = data.Classes.load(tmp_path)
    assert again.names == classes.names
    assert torch.equal(again(["food", "toys_and_games/cards"]), torch.tensor([[1], [0]]))


def test_bad_classes_are_told(tmp_path) -> None:
    with pytest.raises(ValueError, match="names must be different"):
        data.Classes(["a", "a"])
    with pytest.raises(UserError, match=r"'fod' is unknown \(did you mean 'food'"):
        data.Classes(["food"]).number("fod")
    with pytest.raises(data.DataError, match="cannot read"):
        data.Classes.load(tmp_path)
    (tmp_path / "classes.json").write_text("{}")
    with pytest.raises(data.DataError, match="expected a list of names"):
        data.Classes.load(tmp_path)

"""The benchmark of the coder: every contestant that is there gives the symbols back."""

import pytest
import torch

from vlkern.bench import coder
from vlkern.bench.rivals import Absent


@pytest.mark.parametrize("case", list(coder.CONTESTANTS))
def test_contestants_give_the_symbols_back(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coder, "ROWS", 4)
    monkeypatch.setattr(coder, "COUNT", 4 * coder.CHANNELS)
    monkeypatch.setattr(coder, "_CUTS", [i * coder.CHANNELS for i in range(5)])
    event = coder.event(case, "encode")
    want, right = event.truth(), []
    for name, make in event.enter(torch.float32).items():
        if name == "torchac":  # compiles itself when it is imported, which takes half a minute
            continue
        try:
            call = make()
        except Absent:
            continue
        assert torch.equal(call().double(), want), name
        assert not isinstance(call(), torch.Tensor)  # from now on it encodes
        right.append(name)
    assert right[:2] == ["vlkern 1 thread", "vlkern 2 threads"]

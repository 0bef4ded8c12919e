"""vlkern.interop.open_clip.SigLipLoss in the place of open_clip's."""

import inspect
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from open_clip_cases import DIST_IMPLS, compare, original
from ranks import launch
from rooms import ROOT

from vlkern.interop.open_clip import SigLipLoss
from vlkern.kernels.sigmoid_loss.samples import Sample, inputs
from vlkern.ops import sigmoid_contrastive_loss
from vlkern.testing import assert_as_good

needs_open_clip = pytest.mark.skipif(original() is None, reason="open_clip (open_clip_torch) is not installed")
PAIRS, _ = inputs(Sample("", 5, 8), torch.float32, "cpu")


def train(loss_class: Any, dtype: torch.dtype, steps: int = 20) -> list[torch.Tensor]:
    """A tiny two-tower model on pairs that share a hidden code; the curve of losses, then the final parameters."""
    g = torch.Generator().manual_seed(7)
    towers = [torch.nn.Parameter((torch.randn(16, 24, generator=g, dtype=torch.float64) / 5).to(dtype)) for _ in "it"]
    log_scale = torch.nn.Parameter(torch.tensor(10.0, dtype=dtype).log())
    bias = torch.nn.Parameter(torch.tensor(-10.0, dtype=dtype))
    views = [torch.randn(16, 24, generator=g, dtype=torch.float64) for _ in "it"]
    parameters = [*towers, log_scale, bias]
    optimizer = torch.optim.AdamW(parameters, lr=0.02)
    loss_function, curve = loss_class(), []
    for _ in range(steps):
        code = torch.randn(32, 16, generator=g, dtype=torch.float64)
        image, text = (
            F.normalize((code @ view).to(dtype) @ tower.T, dim=-1) for view, tower in zip(views, towers, strict=True)
        )
        loss = loss_function(image, text, log_scale.exp(), bias, output_dict=True)["contrastive_loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.detach())
    return [torch.stack(curve), *(p.detach() for p in parameters)]


@needs_open_clip
def test_twenty_steps_follow_open_clips_curve():
    ours, theirs = train(SigLipLoss, torch.float32), train(original(), torch.float32)
    exact = train(original(), torch.float64)
    assert ours[0][-1] < 0.5 * ours[0][0]
    for results in zip(ours, theirs, exact, strict=True):
        assert_as_good(*results)


@needs_open_clip
def test_every_rank_gets_open_clips_loss_and_gradients(tmp_path):
    """On four ranks `bidir` takes both its kinds of exchange, one both ways and one one way."""
    for rank, results in enumerate(launch(compare, 4, tmp_path)):
        for name in DIST_IMPLS:
            for ours, theirs in zip(results["ours"], results[name], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
        expected = f"rank and world_size must be those of torch.distributed, {(rank, 4)}, got {(3 - rank, 4)}"
        assert results["wrong rank"] == expected


@needs_open_clip
def test_constructor_and_call_have_open_clips_signature():
    for ours, theirs in ((SigLipLoss, original()), (SigLipLoss.forward, original().forward)):
        mine, other = ([(p.name, p.default) for p in inspect.signature(f).parameters.values()] for f in (ours, theirs))
        assert mine[: len(other)] == other
        assert [name for name, _ in mine[len(other) :]] in ([], ["chunk_size"])  # open_clip 4 has it too


def test_is_the_op():
    expected = sigmoid_contrastive_loss(*PAIRS)
    image, text, scale, bias = PAIRS
    assert torch.equal(SigLipLoss()(*PAIRS), expected)
    assert torch.equal(SigLipLoss(True, 0, 1, "gather", 2)(*PAIRS, output_dict=True)["contrastive_loss"], expected)
    keywords = {"image_features": image, "text_features": text, "logit_scale": scale}
    assert torch.equal(SigLipLoss()(**keywords, logit_bias=None), sigmoid_contrastive_loss(image, text, scale, 0.0))
    assert torch.equal(SigLipLoss()(**keywords, logit_bias=bias), expected)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"dist_impl": "ring"}, ValueError, "dist_impl must be one of bidir, shift, reduce, gather, got 'ring'"),
        ({"rank": 2, "world_size": 2}, ValueError, "rank must be below world_size, 2, got 2"),
        ({"rank": -1}, ValueError, "rank must be at least 0, got -1"),
        ({"world_size": 0}, ValueError, "world_size must be at least 1, got 0"),
        ({"world_size": "2"}, TypeError, "world_size must be an integer, got str"),
        ({"chunk_size": -1}, ValueError, "chunk_size must be at least 0, got -1"),
    ],
)
def test_bad_constructor_arguments(arguments, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        SigLipLoss(**arguments)


def test_several_ranks_need_torch_distributed():
    with pytest.raises(ValueError, match=r"world_size must be 1 without an initialised torch\.distributed, got 2"):
        SigLipLoss(world_size=2)(*PAIRS)


def test_example_of_the_documentation_runs(capsys):
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs/interop.md").read_text(), re.DOTALL).group(1)
    exec(compile(code, "docs/interop.md", "exec"), {})
    loss, gradient = map(float, capsys.readouterr().out.split())
    assert loss > 0 and gradient != 0

"""transformers' models inside vlkern.interop.transformers.use_interval_attention."""

import copy
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from transformers.masking_utils import AttentionMaskInterface, sdpa_mask  # noqa: E402
from transformers_models import CASES, Case  # noqa: E402

from vlkern.interop.transformers import use_interval_attention  # noqa: E402
from vlkern.testing import assert_as_good, assert_same_direction, record  # noqa: E402

REGISTRIES = (transformers.AttentionInterface, AttentionMaskInterface)
DTYPES = (torch.float32, torch.bfloat16)


def made(build: Any, dtype: torch.dtype = torch.float32) -> Case:
    torch.manual_seed(0)
    case = build()
    inputs = {key: x.to(dtype) if x.is_floating_point() else x for key, x in case.inputs.items()}
    return case._replace(model=case.model.to(dtype), inputs=inputs)


def layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Every attention but that of the pooling heads, which is torch.nn.MultiheadAttention."""
    return [part for part in model.modules() if type(part).__name__.endswith("Attention") and hasattr(part, "config")]


def run(case: Case, **extra: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The outputs, and the gradients of a random sum of them in every parameter, each parameter's near 1."""
    case.model.zero_grad()
    out = torch.cat([x.flatten() for x in case.outputs(case.model(**case.inputs, **extra))])
    cotangent = torch.randn(len(out), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out.backward(cotangent.to(out.dtype))
    gradients = [p.grad for p in case.model.parameters() if p.grad is not None and p.grad.any()]
    return out.detach(), torch.cat([(g / g.norm()).flatten() for g in gradients])


def outputs(case: Case, **extra: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([x.flatten() for x in case.outputs(case.model(**case.inputs, **extra))])


def eager(case: Case) -> Case:
    """A copy with transformers' own attention."""
    model = copy.deepcopy(case.model)
    model.set_attn_implementation("eager")
    return case._replace(model=model)


def dense(module, query, key, value, mask, scaling, softcap=None, **_):
    """Attention with a Boolean mask [B, 1, Q, K] or none. The eager one rounds to float32, and gives NaN for a query
    without keys in float64."""
    groups = query.shape[1] // key.shape[1]
    s = scaling * query @ key.repeat_interleave(groups, 1).mT
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    s = s if mask is None else s.masked_fill(~mask, -torch.inf)
    return (torch.softmax(s, -1).nan_to_num() @ value.repeat_interleave(groups, 1)).transpose(1, 2), None


@pytest.fixture
def exact():
    """What makes the copy of a case that is exact: in float64."""
    transformers.AttentionInterface.register("dense", dense)
    AttentionMaskInterface.register("dense", lambda **of: sdpa_mask(**{**of, "allow_is_causal_skip": False}))

    def make(case: Case) -> Case:
        model = copy.deepcopy(case.model).double()
        model.set_attn_implementation("dense")
        inputs = {key: x.double() if x.is_floating_point() else x for key, x in case.inputs.items()}
        return case._replace(model=model, inputs=inputs)

    yield make
    for registry in REGISTRIES:
        del registry._global_mapping["dense"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("build", CASES, ids=lambda build: build.__name__)
def test_outputs_and_gradients(build, dtype, exact):
    case = made(build, dtype)
    low, wide = run(eager(case)), run(exact(case))
    with use_interval_attention(case.model), record() as calls:
        ours = run(case)
    names = [call.op._schema.name for call in calls]
    for op in ("interval_attention", "interval_attention_backward"):
        assert names.count(f"vlkern::{op}") == len(layers(case.model)), "every layer attends here"
    for mine, theirs, truth in zip(ours, low, wide, strict=True):
        assert_as_good(mine, theirs, truth)
    assert_same_direction(ours[1], low[1], wide[1])

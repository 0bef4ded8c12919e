"""transformers' models inside vlkern.interop.transformers.use_interval_attention."""

import copy
from contextlib import ExitStack
from typing import Any

import pytest
import torch
import torch._dynamo.testing

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import masking_utils as masking  # noqa: E402
from transformers_models import CASES, LANGUAGE, Case, gemma, gemma2, gemma3, paligemma2, siglip, siglip2  # noqa: E402

from vlkern.interop import attention  # noqa: E402
from vlkern.interop.attention import NAME  # noqa: E402
from vlkern.interop.transformers import use_interval_attention  # noqa: E402
from vlkern.testing import assert_as_good, assert_same_direction, record  # noqa: E402

REGISTRIES = (transformers.AttentionInterface, transformers.AttentionMaskInterface)
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
    """The outputs, and the gradients of a random sum of them in every parameter, scaled so that each module's count
    alike. Not each parameter's: those in the biases of queries and keys cancel, up to exactly zero."""
    case.model.zero_grad()
    out = torch.cat([x.flatten() for x in case.outputs(case.model(**case.inputs, **extra))])
    cotangent = torch.randn(len(out), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out.backward(cotangent.to(out.dtype))
    modules: dict[str, list[torch.Tensor]] = {}
    for name, p in case.model.named_parameters():
        if p.grad is not None and p.grad.any():
            modules.setdefault(name.rpartition(".")[0].rpartition(".")[0], []).append(p.grad.flatten())
    gradients = [torch.cat(parts) for parts in modules.values()]
    return out.detach(), torch.cat([g / g.norm() for g in gradients])


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
    REGISTRIES[0].register("dense", dense)
    REGISTRIES[1].register("dense", lambda **of: masking.sdpa_mask(**{**of, "allow_is_causal_skip": False}))

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


def left(case: Case) -> Case:
    """The same tokens with the padding in front of them, as generate wants it."""
    real = case.inputs["attention_mask"].bool()
    moved = {
        key: torch.stack([torch.cat((row[~r], row[r])) for row, r in zip(x, real, strict=True)])
        for key, x in case.inputs.items()
        if x.shape == real.shape
    }
    return case._replace(inputs={**case.inputs, **moved})


# PaliGemma 2 with a static cache fails in transformers itself.
GENERATED = [(build, {}) for build in LANGUAGE] + [
    (build, {"cache_implementation": "static"}) for build in LANGUAGE if build is not paligemma2
]


@pytest.mark.parametrize(("build", "options"), GENERATED, ids=str)
def test_generate_gives_the_same_tokens(build, options):
    case = left(made(build))
    options = {"max_new_tokens": 6, "do_sample": False, "disable_compile": True, **options}
    theirs = eager(case).model.generate(**case.inputs, **options)
    with use_interval_attention(case.model), record() as calls:
        ours = case.model.generate(**case.inputs, **options)
    assert ours.tolist() == theirs.tolist()
    assert len(calls) >= 6 * 2


def test_compiled_in_one_graph_with_its_gradient():
    case = made(gemma2)
    case.inputs["use_cache"] = False
    compiled = case._replace(model=torch.compile(case.model, fullgraph=True, backend="aot_eager"))
    theirs = run(eager(case))
    with use_interval_attention(case.model):
        torch.testing.assert_close(run(compiled), theirs, rtol=1e-4, atol=1e-5)


def test_compiled_once_for_all_lengths_and_visits():
    case = made(gemma2)
    graphs = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(case.model, fullgraph=True, dynamic=True, backend=graphs)
    with torch.no_grad():
        for length in (10, 7, 13):
            ids = torch.randint(2, 50, (2, length))
            inputs = {"input_ids": ids, "attention_mask": (ids > 5).cummax(1).values.long(), "use_cache": False}
            real = inputs["attention_mask"].bool()
            with use_interval_attention(case.model):
                torch.testing.assert_close(compiled(**inputs).logits[real], case.model(**inputs).logits[real])
    assert graphs.frame_count == 1


def test_checkpointing_and_autocast():
    case = made(gemma2)
    plain = run(eager(case))
    case.model.train()
    with use_interval_attention(case.model):
        case.model.activation_checkpointing_enable()
        torch.testing.assert_close(run(case), plain, rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16), record() as calls:
            ours = run(case)
    assert all(call.args[0].dtype == torch.bfloat16 for call in calls)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = run(eager(case))
    for mine, low, exact in zip(ours, theirs, plain, strict=True):
        assert_as_good(mine, low, exact)


def test_packed_sequences():
    """Positions that start again begin a new text, which sees nothing of the one before."""
    case = made(gemma2)
    ids = case.inputs["input_ids"][:1]
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3]])
    case = case._replace(inputs={"input_ids": ids, "position_ids": positions, "use_cache": False})
    case = case._replace(outputs=lambda out: [out.logits])
    theirs = outputs(eager(case))
    with use_interval_attention(case.model):
        torch.testing.assert_close(outputs(case), theirs)
        case.inputs["input_ids"] = ids.roll(1) * (positions < 9)
        alone = case._replace(inputs={"input_ids": case.inputs["input_ids"][:, 6:]})
        torch.testing.assert_close(outputs(case).view(10, -1)[6:], outputs(alone).view(4, -1))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_prepared_masks(dtype):
    """A [B, 1, Q, K] of the user's own; here two texts in one row."""
    case = made(gemma)
    text = torch.tensor([0] * 6 + [1] * 4)
    seen = ((text == text[:, None]) & torch.ones(10, 10, dtype=torch.bool).tril()).expand(2, 1, -1, -1)
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    mask = seen if dtype == torch.bool else added
    case = case._replace(inputs={"input_ids": case.inputs["input_ids"]}, outputs=lambda out: [out.logits])
    theirs = outputs(eager(case), attention_mask=added)
    with use_interval_attention(case.model):
        torch.testing.assert_close(outputs(case, attention_mask=mask), theirs)
        with pytest.raises(ValueError, match=r"must hold only 0 and .* in model\.layers\.0\.self_attn"):
            case.model(**case.inputs, attention_mask=added / 2)
        with pytest.raises(
            ValueError, match=r"in the mask of model\.layers\.0\.self_attn, query 6 of sequence 0 sees 4"
        ):
            case.model(**case.inputs, attention_mask=(text == text[:, None]).roll(3, 1).expand(2, 1, -1, -1))
        with pytest.raises(ValueError, match=r"\[2, 1, 10, 10\] in model.layers.0.self_attn, got \[2, 1, 10, 8\]"):
            case.model(**case.inputs, attention_mask=mask[..., :8])


def test_without_a_mask_the_module_says_what_is_causal():
    module = torch.nn.Module()
    q, k = torch.randn(2, 2, 3, 8), torch.randn(2, 2, 5, 8)
    for causal in (False, True):
        module.is_causal = causal
        mask = torch.ones(3, 5, dtype=torch.bool).tril() if causal else None
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, k, mask).transpose(1, 2)
        torch.testing.assert_close(attention._attend(module, q, k, k, None)[0], expected)
    whole = attention._attend(module, q[:, :, :1], k, k, None)[0]
    expected = torch.nn.functional.scaled_dot_product_attention(q[:, :, :1], k, k).transpose(1, 2)
    torch.testing.assert_close(whole, expected, msg="one query is a step of decoding")


PADDING = {
    "none": None,
    "left": torch.tensor([[0, 0, 0] + [1] * 9, [1] * 12]),
    "right": torch.tensor([[1] * 12, [1] * 7 + [0] * 5]),
    "all": torch.tensor([[0] * 12, [1] * 12]),
}
BLOCKS = torch.tensor([[-1, 0, 0, 0, 0, -1, -1, 1, 1, 1, 1, -1]] * 2)
FUNCTIONS = {
    "full": masking.bidirectional_mask_function,
    "causal": masking.causal_mask_function,
    "window": masking.sliding_window_causal_mask_function(3),
    "both ways": masking.sliding_window_bidirectional_mask_function(2),
    "images": masking.or_masks(masking.causal_mask_function, masking.blockwise_overlay(BLOCKS)),
    "chunks": masking.chunked_causal_mask_function(5, torch.tensor([3, 0])),
}


@pytest.mark.parametrize("vmap", [False, True], ids=["", "vmap"])
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_masks_are_those_of_transformers(function, padding, vmap, monkeypatch):
    """Key by key for whole texts, the last queries of one, and a cache that has dropped its first keys."""
    monkeypatch.setattr(attention, "_BLOCK", 60)  # some rows at a time
    valid = PADDING[padding]
    valid = None if valid is None else valid.bool()
    for queries, keys, q_offset, kv_offset in [(12, 12, 0, 0), (4, 12, 8, 0), (3, 6, 9, 6), (2, 6, torch.tensor(9), 6)]:
        of = {"batch_size": 2, "q_length": queries, "kv_length": keys, "q_offset": q_offset, "kv_offset": kv_offset}
        of |= {"mask_function": FUNCTIONS[function], "attention_mask": valid, "use_vmap": vmap}
        theirs = masking.sdpa_mask(**of, allow_is_causal_skip=False)[:, 0]
        bounds = attention._mask(**of, allow_is_causal_skip=True)
        assert bounds.shape == (2, 2, queries, 1) and bounds.dtype == torch.int32
        j, (start, stop) = torch.arange(keys), bounds.unbind(1)
        assert torch.equal((j >= start) & (j < stop), theirs)


def test_queries_that_see_nothing_give_zeros():
    case = made(gemma)
    seen = []
    case.model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with use_interval_attention(case.model):
        outputs(case)
    assert not seen[0][1, :4].any() and seen[0][1, 4:].all()


def state(model: torch.nn.Module) -> dict[str, Any]:
    """All that a context could leave behind: registries, classes, configs, and what the modules hold."""
    registries = {
        f"{registry.__name__}.{key}": dict(value)
        for registry in REGISTRIES
        for key, value in [("class", registry._global_mapping)]
    }
    shared = (transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS, masking.ALL_MASK_ATTENTION_FUNCTIONS)
    registries["local"] = [dict(registry._local_mapping) for registry in shared]
    classes = {c: dict(vars(c)) for part in model.modules() for c in type(part).__mro__}
    configs = {id(c): (c, dict(vars(c))) for c in all_configs(model)}
    modules = {
        name: {key: dict(x) if isinstance(x, dict) else x for key, x in vars(part).items()}
        for name, part in model.named_modules()
    }
    return {"registries": registries, "classes": classes, "configs": configs, "modules": modules}


def all_configs(model: torch.nn.Module) -> list[Any]:
    found = [part.config for part in model.modules() if hasattr(part, "config")]
    return found + [c for config in found for c in vars(config).values() if hasattr(c, "_attn_implementation")]


@pytest.mark.parametrize("build", CASES, ids=lambda build: build.__name__)
def test_nothing_stays(build):
    case = made(build)
    before = state(case.model)
    with use_interval_attention(case.model) as model:
        assert model is case.model
        assert {c._attn_implementation for c in all_configs(model)} == {NAME}
    assert state(case.model) == before
    with pytest.raises(ZeroDivisionError), use_interval_attention(case.model):
        outputs(case)
        raise ZeroDivisionError
    assert state(case.model) == before


def test_nested():
    case = made(gemma3)
    before = state(case.model)
    with use_interval_attention(case.model):
        with (
            pytest.raises(ZeroDivisionError),
            use_interval_attention(case.model.model.language_model),
            use_interval_attention(case.model),
        ):
            raise ZeroDivisionError
        with record() as calls:
            outputs(case)
        assert len(calls) == len(layers(case.model)), "the outer one is still on"
    assert state(case.model) == before


def test_a_part_of_a_model():
    """The language model alone gets masks that the whole model made for its own attention."""
    case = made(gemma3)
    theirs = outputs(eager(case))
    with use_interval_attention(case.model.model.language_model), record() as calls:
        torch.testing.assert_close(outputs(case), theirs, rtol=1e-4, atol=1e-5)
    assert len(calls) == 2


def test_two_models_at_once_and_one_that_shares_a_config():
    first, second = made(siglip), made(gemma)
    twin = type(first.model)(first.model.config).eval()
    twin.load_state_dict(first.model.state_dict())
    expected = [outputs(first), outputs(second)]
    with use_interval_attention(first.model):
        with use_interval_attention(second.model), record() as calls:
            torch.testing.assert_close([outputs(first), outputs(second)], expected)
            assert len(calls) == 6
            torch.testing.assert_close(outputs(first._replace(model=twin)), expected[0])
            assert len(calls) == 6, "the twin is outside"
        with record() as calls:
            outputs(first)
            outputs(second)
            assert len(calls) == 4
    assert first.model.config is twin.config


def test_changes_of_a_config_inside_are_kept():
    case = made(gemma3)
    config, sub = case.model.config, case.model.config.text_config
    with use_interval_attention(case.model):
        case.model.config.text_config.use_cache = False
        case.model.config.note = "kept"
        case.model.set_attn_implementation("eager")
    assert (sub.use_cache, config.note) == (False, "kept")
    assert (sub._attn_implementation, config.text_config) == ("sdpa", sub)

    twin = type(case.model)(config)
    with ExitStack() as outside:
        with use_interval_attention(case.model):
            outside.enter_context(use_interval_attention(twin))
            case.model.config.note = "newer"
        assert config.note == "newer"
    assert config.note == "newer", "the twin changed nothing"


def test_dropout_in_training():
    case = made(siglip)
    for layer in layers(case.model.text_model):
        layer.dropout = 0.1
    with use_interval_attention(case.model):
        outputs(case)
        case.model.train()
        with pytest.raises(
            ValueError, match=r"dropout must be 0 .* text_model\.encoder\.layers\.0\.self_attn has 0\.1"
        ):
            outputs(case)


@pytest.mark.parametrize("build", [siglip, siglip2, gemma, gemma3], ids=lambda build: build.__name__)
def test_attention_weights(build):
    case = made(build)
    with use_interval_attention(case.model):
        with pytest.raises(ValueError, match=r"output_attentions must be False: \S*layers\.0\.self_attn does not"):
            case.model(**case.inputs, output_attentions=True)
        outputs(case, output_hidden_states=True)
    case.model.set_attn_implementation("eager")
    case.model.config.output_attentions = True
    with pytest.raises(ValueError, match="config has output_attentions=True"), use_interval_attention(case.model):
        pass


def test_padding_in_the_middle(monkeypatch):
    monkeypatch.setattr(attention, "_BLOCK", 1)  # row by row
    case = made(gemma3)
    case.inputs["attention_mask"][0, 5] = 0
    with (
        use_interval_attention(case.model),
        pytest.raises(ValueError, match=r"the mask of gemma3_text, query 3 of sequence 0 sees 6 of the keys 0 to 6"),
    ):
        outputs(case)
    text = made(siglip)
    text.inputs["attention_mask"][1, 1] = 0
    with (
        use_interval_attention(text.model),
        pytest.raises(
            ValueError, match=r"the mask of siglip_text_model, query 0 of sequence 1 sees 4 of the keys 0 to 4"
        ),
    ):
        outputs(text)


def test_what_cannot_be_entered():
    def enter(model):
        with use_interval_attention(model):
            pytest.fail("entered")

    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        enter("google/siglip2-base-patch16-naflex")
    with pytest.raises(ValueError, match="must hold attention layers of transformers, got Linear"):
        enter(torch.nn.Linear(2, 2))
    model = made(gemma).model
    model.model.layers[1].self_attn.head_dim = 12
    before = state(model)
    with pytest.raises(ValueError, match=r"multiples of 8 up to 256, but model\.layers\.1\.self_attn has 12"):
        enter(model)
    assert state(model) == before

    class Older(transformers.GemmaForCausalLM):
        _supports_attention_backend = False

    with pytest.raises(
        ValueError, match="must attend through transformers' AttentionInterface, but it, Older, does not"
    ):
        enter(Older(model.config))


@pytest.mark.parametrize("extra", ["position_bias", "s_aux"])
def test_scores_with_something_added(extra):
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match="Module adds a bias or a sink to its scores"):
        attention._attend(torch.nn.Module(), q, q, q, None, **{extra: torch.zeros(2)})

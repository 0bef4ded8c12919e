"""transformers' models on interval_attention. transformers is imported when a model is entered, not with this module.

transformers looks two functions up by the name in `config._attn_implementation`: one that makes a mask for a tower, one
that attends in every layer. Ours pass each other the interval of keys that every query sees, int32 [B, 2, Q, 1]: laid
out as [B, heads, Q, K] is, because transformers hands on four-dimensional masks untouched (`generate` prepares some
before the model is called).
"""

import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from functools import partial
from typing import Any

import torch

from vlkern import _checks
from vlkern.kernels.interval_attention import LARGEST_HEAD
from vlkern.ops import interval_attention

NAME = "vlkern_interval_attention"
#: Where a config of transformers keeps the name; it is no part of what is saved.
_CHOICE = "_attn_implementation_internal"
#: Booleans of a mask that exist at once.
_BLOCK = 1 << 22

_lock = threading.Lock()
_entered = 0
_names: "weakref.WeakKeyDictionary[torch.nn.Module, str]" = weakref.WeakKeyDictionary()


@contextmanager
def use_interval_attention(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Inside the context, this model of transformers attends through `vlkern.ops.interval_attention`.

    Full, causal, sliding-window, prefix and image-block masks, padding on either side, packed sequences, grouped
    queries, softcap and key/value caches work as they do with transformers' own attention, and so do gradients. Nothing
    is patched: the functions are registered with transformers' AttentionInterface and AttentionMaskInterface under a
    name of their own, and the model's modules see copies of their configs that ask for this name. Both are undone on
    exit; what was assigned to a config meanwhile is kept. Contexts may be nested, and several models may be inside at
    once. Models that share a config object with this one keep their attention.

    Args:
        model: SiglipModel, Siglip2Model, GemmaForCausalLM, Gemma2ForCausalLM, Gemma3ForConditionalGeneration,
            PaliGemmaForConditionalGeneration, a part of one, or another model that is made for transformers'
            AttentionInterface; also wrapped in another module.

    Yields:
        model.

    Raises:
        TypeError: model is no module.
        ValueError: it holds no such attention, its head dim is no multiple of 8 up to 256, or its config asks for
            attention weights. Inside the context: attention dropout in training, `output_attentions=True`, or a mask in
            which the keys of a query are not one interval (as with padding in the middle of a sequence).

    Example:
        >>> with use_interval_attention(model):
        ...     tokens = model.generate(**inputs)
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    with ExitStack() as undo:
        for name, layer in _attention_layers(model).items():
            _names[layer] = name
            refuse = layer.register_forward_pre_hook(partial(_refuse_weights, name), with_kwargs=True)
            undo.callback(refuse.remove)
        _register()
        undo.callback(_unregister)
        undo.enter_context(_own_configs(model))
        yield model


def _attention_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The modules that call transformers' attention interface, by name."""
    from transformers import PreTrainedConfig, PreTrainedModel

    for name, part in model.named_modules():
        if not isinstance(part, PreTrainedModel):
            continue
        if not part._supports_attention_backend:
            raise ValueError(
                f"model must attend through transformers' AttentionInterface, but {name or 'it'}, "
                f"{type(part).__name__}, does not"
            )
        if part.config.output_attentions:
            raise ValueError(
                f"model must not return attention weights, which are never made here; {type(part).__name__}'s config "
                "has output_attentions=True"
            )
    # Rotary embeddings have a head_dim as well, and torch's own attention has no config.
    found = {
        name: part
        for name, part in model.named_modules()
        if isinstance(getattr(part, "config", None), PreTrainedConfig)
        and isinstance(getattr(part, "head_dim", None), int)
        and hasattr(part, "is_causal")
    }
    if not found:
        raise ValueError(f"model must hold attention layers of transformers, got {type(model).__name__}")
    for name, layer in found.items():
        if layer.head_dim % 8 or not 0 < layer.head_dim <= LARGEST_HEAD:
            raise ValueError(
                f"model must have head dims that are multiples of 8 up to {LARGEST_HEAD}, but {name} has "
                f"{layer.head_dim}"
            )
    return found


def _refuse_weights(name: str, layer: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    if kwargs.get("output_attentions"):
        raise ValueError(f"output_attentions must be False: {name} does not make attention weights here")


def _register() -> None:
    global _entered
    from transformers import AttentionInterface, AttentionMaskInterface

    with _lock:
        _entered += 1
        AttentionInterface.register(NAME, _attend)
        AttentionMaskInterface.register(NAME, _mask)


def _unregister() -> None:
    global _entered
    from transformers import AttentionInterface, AttentionMaskInterface

    with _lock:
        _entered -= 1
        if not _entered:
            for registry in (AttentionInterface, AttentionMaskInterface):
                del registry._global_mapping[NAME]  # the mapping that register writes; there is no method for it


@contextmanager
def _own_configs(model: torch.nn.Module) -> Iterator[None]:
    """The model's modules see copies of their configs, and of the configs in these, that choose our attention."""
    from transformers import PreTrainedConfig

    copies: dict[int, Any] = {}
    originals: dict[int, Any] = {}
    at_entry: dict[int, dict[str, Any]] = {}

    def own(config: Any) -> Any:
        if id(config) not in copies:
            mine = copies[id(config)] = copy(config)
            for key, value in vars(config).items():
                if isinstance(value, PreTrainedConfig):
                    vars(mine)[key] = own(value)
            vars(mine)[_CHOICE] = NAME
            originals[id(mine)], at_entry[id(mine)] = config, dict(vars(mine))
        return copies[id(config)]

    held = [
        (part, key, config)
        for part in model.modules()
        for key, config in vars(part).items()
        if isinstance(config, PreTrainedConfig)
    ]
    for part, key, config in held:
        setattr(part, key, own(config))
    try:
        yield
    finally:
        for part, key, config in held:
            setattr(part, key, config)
        for mine in copies.values():
            before, config = at_entry[id(mine)], originals[id(mine)]
            for key, value in vars(mine).items():
                if key != _CHOICE and not (key in before and value is before[key]):
                    vars(config)[key] = originals.get(id(value), value)


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: torch.Tensor | None = None,
    use_vmap: bool = False,
    device: Any = "cpu",
    config: Any = None,
    **options: Any,
) -> torch.Tensor | None:
    """The AttentionMaskInterface's function: intervals [B, 2, Q, 1] of the keys kv_offset .. kv_offset + kv_length."""
    from transformers.masking_utils import (
        bidirectional_mask_function,
        causal_mask_function,
        prepare_padding_mask,
        sdpa_mask,
    )

    shared = {"mask_function": mask_function, "attention_mask": attention_mask, "use_vmap": use_vmap, "device": device}
    if mask_function is bidirectional_mask_function and q_length == 1:
        # SigLIP 2's pooling gives this one to torch's own attention, which wants Booleans; it is O(K) here.
        return sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, **shared, **options)

    where = f"the mask of {getattr(config, 'model_type', 'the model')}"
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if mask_function in (bidirectional_mask_function, causal_mask_function):
        if padding is None:
            valid = torch.ones(batch_size, 1, kv_length, dtype=torch.bool, device=device)
        else:
            valid = padding[:, None, kv_offset : kv_offset + kv_length].bool()
        start, stop = (bound.expand(batch_size, q_length) for bound in _interval(valid, where))
        if mask_function is causal_mask_function:
            reach = torch.arange(1, q_length + 1, device=device, dtype=torch.int32) + (q_offset - kv_offset)
            stop = torch.maximum(torch.minimum(stop, reach.int()), start)
        return torch.stack((start, stop), 1)[..., None]

    # Compiled code fuses the Booleans away, and a loop would fix the length.
    rows = None if torch.compiler.is_compiling() else max(1, _BLOCK // max(1, batch_size * kv_length))
    blocks = []
    for first in (0,) if rows is None else range(0, q_length, rows):
        count = q_length if rows is None else min(rows, q_length - first)
        visible: Any = sdpa_mask(
            batch_size, count, kv_length, q_offset + first, kv_offset, **shared, allow_is_causal_skip=False
        )
        # A query that is padding itself may see padding's neighbours with a hole between; nobody looks at its output.
        queries = torch.arange(first, first + count, device=device) + q_offset
        real = None if padding is None else padding[:, queries].bool()
        blocks.append(torch.stack(_interval(visible[:, 0], where, first, real), 1))
    return torch.cat(blocks, -1)[..., None]


def _interval(
    visible: torch.Tensor, where: str, first: int = 0, real: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """First and one past the last True of each row of [B, Q, K], int32 [B, Q]; both 0 in a row without any.

    Raises:
        ValueError: there is a False between, in a row that is `real` [B, Q] (looked at where that needs no wait for a
            GPU).
    """
    keys = visible.shape[-1]
    j = torch.arange(keys, device=visible.device, dtype=torch.int32)
    stop = torch.where(visible, j + 1, 0).amax(-1)
    start = torch.minimum(torch.where(visible, j, keys).amin(-1), stop)
    if _checks.values_may_be_read(visible):
        holes = stop - start != visible.sum(-1)
        if real is not None:
            holes &= real
        if holes.any():
            b, i = holes.nonzero()[0].tolist()
            raise ValueError(
                f"attention_mask must let each query see one interval of keys, without holes; in {where}, query "
                f"{first + i} of sequence {b} sees {int(visible[b, i].sum())} of the keys {int(start[b, i])} to "
                f"{int(stop[b, i]) - 1}"
            )
    return start.int(), stop.int()


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """The AttentionInterface's function: query [B, Hq, Q, D], key and value [B, Hkv, K, D] -> [B, Q, Hq, D]."""
    if dropout:
        raise ValueError(f"attention dropout must be 0 in training, but {_named(module)} has {dropout}")
    if position_bias is not None or s_aux is not None:
        raise ValueError(f"{_named(module)} adds a bias or a sink to its scores, which interval_attention does not")
    batch, heads, rows, _ = query.shape
    keys = key.shape[2]
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        start = torch.zeros(batch, rows, dtype=torch.int32, device=query.device)
        stop = torch.full_like(start, keys)
        if causal and rows > 1:  # one row is a step of decoding, which sees the whole cache
            stop = torch.arange(1, rows + 1, dtype=torch.int32, device=query.device).expand(batch, rows)
    elif attention_mask.dtype == torch.int32 and attention_mask.shape == (batch, 2, rows, 1):
        start, stop = attention_mask[..., 0].unbind(1)
    elif attention_mask.shape == (batch, 1, rows, keys) and attention_mask.dtype not in (torch.int32, torch.int64):
        start, stop = _interval(_visible(module, attention_mask), f"the mask of {_named(module)}")
    else:
        raise ValueError(
            f"attention_mask must be Boolean or float [batch, 1, queries, keys], [{batch}, 1, {rows}, {keys}] in "
            f"{_named(module)}, got {list(attention_mask.shape)} {attention_mask.dtype}"
        )
    if batch > 1:  # the sequences of the batch lie one after another
        offset = torch.arange(0, batch * keys, keys, dtype=torch.int32, device=query.device)[:, None]
        start, stop = start + offset, stop + offset
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    out = interval_attention(
        q,
        k,
        v,
        start.reshape(-1),
        stop.reshape(-1),
        scale=scaling,
        softcap=softcap,
    )
    return out.view(batch, rows, heads, -1), None


def _visible(module: torch.nn.Module, mask: torch.Tensor) -> torch.Tensor:
    """[B, Q, K]: where a prepared mask, Boolean or to be added to the scores, lets a query see a key."""
    if mask.dtype == torch.bool:
        return mask[:, 0]
    lowest = torch.finfo(mask.dtype).min
    if _checks.values_may_be_read(mask) and bool(((mask != 0) & (mask > lowest)).any()):
        raise ValueError(
            f"attention_mask must hold only 0 and {lowest:.4g} or -inf where it is a float, in {_named(module)}"
        )
    return mask[:, 0] == 0


def _named(module: torch.nn.Module) -> str:
    return _names.get(module, type(module).__name__)

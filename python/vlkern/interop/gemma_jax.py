"""Gemma with the names of the JAX code: google-deepmind/gemma's checkpoints, and the language model in big_vision's.

Arrays lie in a tree, whose names are joined by slashes here: `transformer/layer_0/attn/q_einsum/w`, or in big_vision
`params/llm/layers/attn/q_einsum/w` with all layers stacked along the first axis. An .npz file or a dict holds them.

    N query heads   K key heads   H channels of a head   D width   F units of one branch of the MLP
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlkern.errors import UserError
from vlkern.layers.init import shapes_only
from vlkern.models.gemma import Gemma, GemmaConfig
from vlkern.models.gemma_files import WHAT as WHAT
from vlkern.models.gemma_files import fill, preset_like
from vlkern.models.state import Checkpoint, Source, as_tensor, layers

Layout = Callable[[torch.Tensor], torch.Tensor]
_TABLE = "embedder/input_embedding"


def knows(names: Collection[str], entries: Mapping[str, Any]) -> bool:
    """Whether these are the arrays of a language model and nothing else."""
    root = _root(names)
    return root is not None and all(name.startswith(root) for name in names)


def load(
    checkpoint: Checkpoint, entries: Mapping[str, Any], where: Path, config: object, dtype: torch.dtype | None
) -> Gemma:
    """The model of an .npz file.

    Args:
        checkpoint: its arrays.
        entries: unused: JAX checkpoints have no config.json.
        where: unused.
        config: the user's GemmaConfig, or None: then a preset with these shapes tells windows, bases of RoPE and caps.
        dtype: of the parameters; None keeps the file's.

    Raises:
        UserError: the arrays are not those of a Gemma, or no preset has their shapes.
    """
    root = _root(checkpoint.shapes)
    assert root is not None  # knows() said so
    if config is None:
        config = config_of(checkpoint, root)
    if not isinstance(config, GemmaConfig):
        raise UserError(f"{checkpoint.path} holds {WHAT}: config must be a GemmaConfig, got {type(config).__name__}")
    with shapes_only():
        model = Gemma(config)
    fill(model, checkpoint, sources(checkpoint.shapes, config, root), dtype)
    return model


def from_arrays(
    tree: Mapping[str, Any], config: GemmaConfig | None = None, *, dtype: torch.dtype | None = None
) -> Gemma:
    """The model of a tree of arrays, such as orbax restores from an official checkpoint.

    Args:
        tree: nested dicts, or one dict with names joined by slashes or dots; leaves are NumPy or JAX arrays, float or
            bfloat16.
        config: what the arrays belong to; None: the preset with these shapes.
        dtype: of the parameters; None keeps the arrays'.

    Raises:
        UserError: a ValueError: these are not the arrays of a Gemma, all that are missing, left over or of a wrong
            shape are listed, or no preset has their shapes.

    Example:
        >>> model = vlkern.interop.gemma_jax.from_arrays(checkpointer.restore(path))
    """
    checkpoint = Arrays(tree)
    if not knows(checkpoint.shapes, {}):
        raise UserError(
            f"tree must hold {_TABLE} and nothing but a Gemma, got {', '.join(list(checkpoint.shapes)[:4])}"
        )
    return load(checkpoint, {}, checkpoint.path, config, dtype)


class Arrays:
    """A tree of arrays in memory, as a checkpoint."""

    path = Path("tree")

    def __init__(self, tree: Mapping[str, Any]) -> None:
        self._tensors = dict(_leaves(tree, ""))
        self.shapes = {name: tensor.to("meta") for name, tensor in self._tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        """The array as a tensor, which shares its memory where that may be written to."""
        return self._tensors[name]


def _leaves(tree: Mapping[str, Any], path: str) -> Iterable[tuple[str, torch.Tensor]]:
    for key, value in tree.items():
        name = path + str(key)
        if isinstance(value, Mapping):
            yield from _leaves(value, name + "/")
        else:
            try:
                yield name, as_tensor(np.require(value, requirements="W"))  # PyTorch wants memory that can be written
            except TypeError as error:
                raise UserError(f"tree: {name} must be an array of numbers, got {type(value).__name__}") from error


def _root(names: Iterable[str]) -> str | None:
    """What all names of the language model begin with; None when there is none."""
    return next((name.removesuffix(_TABLE) for name in names if name.endswith(_TABLE)), None)


def _same(a: torch.Tensor) -> torch.Tensor:
    return a


def _heads(a_NDH: torch.Tensor) -> torch.Tensor:
    return a_NDH.permute(0, 2, 1).flatten(0, 1)


def _output(a_NHD: torch.Tensor) -> torch.Tensor:
    return a_NHD.permute(2, 0, 1).flatten(1)


def sources(shapes: Mapping[str, torch.Tensor], c: GemmaConfig, root: str) -> dict[str, Source]:
    """Parameter of Gemma -> arrays whose names begin with `root`; `shapes` tells which of the layouts it is."""
    first, stacked = _first(shapes, root)
    slash = {name: "/w" if f"{first}mlp/{name}/w" in shapes else "" for name in ("gating_einsum", "linear")}
    # [2, D, F]; Gemma 3 and the large ones of Gemma 2 [2, F, D].
    gates = shapes.get(f"{first}mlp/gating_einsum{slash['gating_einsum']}")
    turned = c.version == 3 if c.mlp == c.width else gates is not None and tuple(gates.shape[-2:]) == (c.mlp, c.width)

    def gate(i: int) -> Layout:
        return lambda a: a[i] if turned else a[i].t()

    fused = f"{first}attn/qkv_einsum/w" in shapes  # as many key heads as query heads
    table: dict[str, tuple[str, Layout]] = {
        "self_attn.q_proj": ("attn/qkv_einsum/w", lambda a: _heads(a[0])) if fused else ("attn/q_einsum/w", _heads),
        "self_attn.k_proj": (f"attn/{'qkv' if fused else 'kv'}_einsum/w", lambda a: _heads(a[-2])),
        "self_attn.v_proj": (f"attn/{'qkv' if fused else 'kv'}_einsum/w", lambda a: _heads(a[-1])),
        "self_attn.o_proj": ("attn/attn_vec_einsum/w", _output),
        "mlp.gate_proj": (f"mlp/gating_einsum{slash['gating_einsum']}", gate(0)),
        "mlp.up_proj": (f"mlp/gating_einsum{slash['gating_einsum']}", gate(1)),
        "mlp.down_proj": (f"mlp/linear{slash['linear']}", torch.t),
        "input_layernorm": ("pre_attention_norm/scale", _same),
    }
    if c.version == 1:
        table["post_attention_layernorm"] = ("pre_ffw_norm/scale", _same)
    else:
        table["post_attention_layernorm"] = ("post_attention_norm/scale", _same)
        table["pre_feedforward_layernorm"] = ("pre_ffw_norm/scale", _same)
        table["post_feedforward_layernorm"] = ("post_ffw_norm/scale", _same)
    if c.version == 3:
        table["self_attn.q_norm"] = ("attn/_query_norm/scale", _same)
        table["self_attn.k_norm"] = ("attn/_key_norm/scale", _same)

    def layer(layout: Layout, i: int) -> Layout:
        def of_stack(stack: torch.Tensor) -> torch.Tensor:
            if stack.shape[0] != c.depth:
                raise ValueError(f"expected {c.depth} layers, got {stack.shape[0]}")
            return layout(stack[i])

        return of_stack if stacked else layout

    return {
        "model.embed_tokens.weight": Source((root + _TABLE,), _same),
        "model.norm.weight": Source((f"{root}final_norm/scale",), _same),
        **{
            f"model.layers.{i}.{ours}.weight": Source(
                ((first if stacked else re.sub(r"0/$", f"{i}/", first)) + theirs,), layer(layout, i)
            )
            for i in range(c.depth)
            for ours, (theirs, layout) in table.items()
        },
    }


def _first(shapes: Collection[str], root: str) -> tuple[str, bool]:
    """What the names of the first layer begin with, and whether it is a stack of all layers."""
    for folder in ("layer_0/", "layers/0/", "layers/"):
        if any(name.startswith(root + folder) for name in shapes):
            return root + folder, folder == "layers/"
    return f"{root}layer_0/", False


def config_of(checkpoint: Checkpoint, root: str) -> GemmaConfig:
    """The preset with the shapes of the arrays under `root`.

    Raises:
        UserError: there is none, or arrays are missing.
    """
    shapes = checkpoint.shapes
    first, stacked = _first(shapes, root)

    def shape(name: str) -> tuple[int, ...]:
        found = next((f"{first}{name}{end}" for end in ("", "/w") if f"{first}{name}{end}" in shapes), None)
        if found is None:
            raise UserError(f"{checkpoint.path}: missing {first}{name}, which says how large the model is")
        return tuple(shapes[found].shape)[1 if stacked else 0 :]

    (vocabulary, width), vector = shapes[root + _TABLE].shape, shape("attn/attn_vec_einsum/w")
    fused = f"{first}attn/qkv_einsum/w" in shapes
    keys = vector[0] if fused else shape("attn/kv_einsum/w")[1]
    qk_norm, post = f"{first}attn/_query_norm/scale" in shapes, f"{first}post_attention_norm/scale" in shapes
    some = next(iter(name for name in shapes if name.startswith(first)))
    return preset_like(
        checkpoint.path,
        version=3 if qk_norm else 2 if post else 1,
        vocabulary=vocabulary,
        width=width,
        depth=shapes[some].shape[0] if stacked else layers(shapes, first[: -len("0/")]),
        mlp=shape("mlp/linear")[0],
        q=vector[0] * vector[1],
        k=keys * vector[1],
    )

"""GIVT with big_vision's names, as in its .npz files: every layer by itself, or all layers stacked on the second axis.

    EmbedLabels   EmbedTargets   decoder/{pos_emb, EncDecBlock0/..., LayerNorm, LogitsDense}   stacked: EncDecBlock/...
    EmbedPatches   pos_embedding_encoder   encoder/...                                     with an encoder of pixels

Shapes tell the sizes, but not what the outputs mean (528 are a joint mixture of 16 components, or 11 for each channel):
a preset with the same shapes does, or `config`. Adaptors lie in files of their own: `load_adaptor`.
"""

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from vlkern.errors import UserError
from vlkern.interop.big_vision import BLOCK, Layout, Table, linear, norm
from vlkern.layers.init import shapes_only
from vlkern.layers.mixture import parameters
from vlkern.models.adaptor import Adaptor, AdaptorConfig
from vlkern.models.givt import PRESETS, Givt, GivtConfig
from vlkern.models.state import Checkpoint, Source, collect, layers, need, open_checkpoint

#: What `load_pretrained` says of options for other models.
WHAT = "a GIVT"
_TOKENS, _POSITIONS = "EmbedTargets/kernel", "decoder/pos_emb"


def _rows(table: torch.Tensor) -> torch.Tensor:
    return table.squeeze(0)


def _same(a: torch.Tensor) -> torch.Tensor:
    return a


def _heads(kernel: torch.Tensor) -> torch.Tensor:
    return kernel.flatten(1, 2).permute(1, 0)


def _output(kernel: torch.Tensor) -> torch.Tensor:
    return kernel.flatten(0, 1).permute(1, 0)


def _convolution(kernel: torch.Tensor) -> torch.Tensor:
    return kernel.permute(3, 2, 0, 1)


def _attention(ours: str, theirs: str) -> Table:
    words = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}
    table = {f"{ours}.{name}.weight": (f"{theirs}/{word}/kernel", _heads) for name, word in words.items()}
    return {**table, f"{ours}.out_proj.weight": (f"{theirs}/out/kernel", _output)}


_MODEL: Table = {
    "label_embedding.weight": ("EmbedLabels/embedding", _same),
    **linear("token_embedding", "EmbedTargets"),
    "position_embedding": (_POSITIONS, _rows),
    **norm("final_layer_norm", "decoder/LayerNorm"),
    **linear("head.linear", "decoder/LogitsDense"),
}
_BLOCK: Table = {
    "layer_norm1.weight": ("LayerNorm1/scale", _same),
    **_attention("self_attn", "SelfAttn"),
    "layer_norm2.weight": ("LayerNorm3/scale", _same),
    **linear("mlp.fc1", "MLP/Dense_0"),
    **linear("mlp.fc2", "MLP/Dense_1"),
}
_CROSS: Table = {"cross_norm.weight": ("LayerNorm2/scale", _same), **_attention("cross_attn", "CrossAttn")}
_ENCODER: Table = {
    **linear("embeddings.patch_embedding", "EmbedPatches", _convolution),
    "embeddings.position_embedding.weight": ("pos_embedding_encoder", _rows),
    **norm("post_layernorm", "encoder/encoder_norm"),
}


def _root(names: Collection[str]) -> str | None:
    return next((root for root in ("params/", "") if {root + _TOKENS, root + _POSITIONS} <= set(names)), None)


def knows(names: Collection[str], entries: Mapping[str, Any]) -> bool:
    """Whether these are the names of a GIVT."""
    return _root(names) is not None


def _blocks(table: Table, folder: str, depth: int, axis: int, *, stacked: bool) -> dict[str, Source]:
    """Of the blocks folder0, folder1, ..., or of their stack along this axis, whose name has no number."""

    def layer(layout: Layout, i: int) -> Layout:
        def of_stack(stack: torch.Tensor) -> torch.Tensor:
            if stack.shape[axis] != depth:
                raise ValueError(f"expected {depth} layers, got {stack.shape[axis]}")
            return layout(stack.select(axis, i))

        return of_stack if stacked else layout

    return {
        f"layers.{i}.{ours}": Source((f"{folder}{'' if stacked else i}/{theirs}",), layer(layout, i))
        for i in range(depth)
        for ours, (theirs, layout) in table.items()
    }


def sources(c: GivtConfig, root: str, *, stacked: bool) -> dict[str, Source]:
    """Parameter of Givt -> arrays whose names begin with `root`; without an adaptor."""
    found = {ours: Source((root + theirs,), layout) for ours, (theirs, layout) in _MODEL.items()}
    block = _BLOCK if c.encoder is None else _BLOCK | _CROSS
    found |= _blocks(block, f"{root}decoder/EncDecBlock", c.depth, 1, stacked=stacked)
    if c.encoder is not None:
        found |= {f"encoder.{ours}": Source((root + theirs,), layout) for ours, (theirs, layout) in _ENCODER.items()}
        folder = f"{root}encoder/encoderblock{'' if stacked else '_'}"
        inside = _blocks(BLOCK, folder, c.encoder.depth, 0, stacked=stacked)
        found |= {f"encoder.encoder.{name}": source for name, source in inside.items()}
    return found


def adaptor_sources(c: AdaptorConfig, root: str = "") -> dict[str, Source]:
    """Parameter of Adaptor -> arrays whose names begin with `root`."""
    found = {}
    for i in range(c.blocks):
        for j in range(3):
            folder = f"{root}modules_{i}/"
            found[f"blocks.{i}.conv{j}.weight"] = Source((f"{folder}Conv_{j}/kernel",), _convolution)
            if i or j:
                found[f"blocks.{i}.norm{j}.weight"] = Source((f"{folder}gn_{j}/scale",), _same)
                found[f"blocks.{i}.norm{j}.bias"] = Source((f"{folder}gn_{j}/bias",), _same)
    return found


def load_adaptor(source: str | os.PathLike[str], config: AdaptorConfig, *, root: str = "params/") -> Adaptor:
    """The adaptor of an .npz file; `model.adaptor` of a GIVT made with its configuration can be set to it.

    Args:
        source: the file.
        config: sizes.
        root: what the names of its arrays begin with.

    Raises:
        UserError: the file cannot be read, or its arrays do not fit.

    Example:
        >>> adaptor = vlkern.interop.givt_jax.load_adaptor("adaptor.npz", AdaptorConfig(16, (16, 16), bottleneck=64))
    """
    with shapes_only():
        adaptor = Adaptor(config)
    state = collect(open_checkpoint(Path(source)), adaptor.state_dict(), adaptor_sources(config, root), None, root)
    adaptor.load_state_dict(state, assign=True)
    return adaptor


def config_of(checkpoint: Checkpoint, root: str) -> GivtConfig:
    """The preset with the shapes of the arrays under `root`.

    Raises:
        UserError: there is none, or arrays are missing.
    """
    stacked = _stacked(checkpoint, root)
    block = f"{root}decoder/EncDecBlock{'' if stacked else 0}/"
    table, tokens, places, query, fc1, head = need(
        checkpoint,
        {
            f"{root}EmbedLabels/embedding": 2,
            root + _TOKENS: 2,
            root + _POSITIONS: 3,
            f"{block}SelfAttn/query/kernel": 3 + stacked,
            f"{block}MLP/Dense_0/kernel": 2 + stacked,
            f"{root}decoder/LogitsDense/kernel": 2,
        },
    )
    depth = query[1] if stacked else layers(checkpoint.shapes, f"{root}decoder/EncDecBlock")
    sizes = (tokens[1], depth, query[-2], fc1[-1], places[1], tokens[0], head[1])
    for c in PRESETS.values():
        outputs = parameters(c.layout, c.channels, c.components)
        known = (c.width, c.depth, c.heads, c.mlp, c.places, c.channels, outputs)
        if known == sizes and max(c.labels, 1) + len(c.rows) == table[0] and c.adaptor is None:
            return c
    raise UserError(
        f"{checkpoint.path}: no preset has width {sizes[0]}, {depth} layers of {sizes[2]} heads and {sizes[3]} units, "
        f"{sizes[4]} places, tokens of {sizes[5]} channels, {sizes[6]} outputs and {table[0]} labels: pass config="
    )


def _stacked(checkpoint: Checkpoint, root: str) -> bool:
    return any(name.startswith(f"{root}decoder/EncDecBlock/") for name in checkpoint.shapes)


def load(
    checkpoint: Checkpoint, entries: Mapping[str, Any], where: Path, config: object, dtype: torch.dtype | None
) -> Givt:
    """The model of an .npz file.

    Args:
        checkpoint: its arrays.
        entries: unused: JAX checkpoints have no config.json.
        where: unused.
        config: the user's GivtConfig, or None: then the preset with these shapes.
        dtype: of the parameters; None keeps the file's.

    Raises:
        UserError: the arrays are not those of a GIVT, or no preset has their shapes.
    """
    root = _root(checkpoint.shapes)
    assert root is not None  # knows() said so
    if config is None:
        config = config_of(checkpoint, root)
    if not isinstance(config, GivtConfig):
        raise UserError(f"{checkpoint.path} holds {WHAT}: config must be a GivtConfig, got {type(config).__name__}")
    if config.adaptor is not None:
        raise UserError(f"{checkpoint.path} holds {WHAT}: config.adaptor must be None, set model.adaptor afterwards")
    with shapes_only():
        model = Givt(config)
    found = sources(config, root, stacked=_stacked(checkpoint, root))
    model.load_state_dict(collect(checkpoint, model.state_dict(), found, dtype, root), assign=True)
    return model

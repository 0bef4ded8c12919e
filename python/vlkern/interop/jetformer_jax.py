"""JetFormer with big_vision's names, as in its .npz files: a Jet, `params_adaptor`, and a Gemma 1, `decoder`."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from vlkern.errors import UserError
from vlkern.interop import gemma_jax, jet_jax
from vlkern.interop.big_vision import linear
from vlkern.layers.init import shapes_only
from vlkern.models.jetformer import PRESETS, JetFormer, JetFormerConfig
from vlkern.models.patch_pca import PatchPca
from vlkern.models.state import Checkpoint, Source, collect, same

#: What `load_pretrained` says of options for other models.
WHAT = "a JetFormer"
_FLOW, _DECODER = "params_adaptor/", "decoder/"
_TABLE, _HEAD, _NORM = "EmbedText/embedding", "LogitsImage/kernel", "decoder/final_norm/scale"


def knows(names: Collection[str], entries: Mapping[str, Any]) -> bool:
    """Whether there are a table of words, a head of mixtures and a flow."""
    root = _root(names)
    return all(root + name in names for name in (_TABLE, _HEAD, _FLOW + jet_jax.CHANNELS))


def load(
    checkpoint: Checkpoint, entries: Mapping[str, Any], where: Path, config: object, dtype: torch.dtype | None
) -> JetFormer:
    """The model of an .npz file.

    Args:
        checkpoint: its arrays.
        entries: unused: JAX checkpoints have no config.json.
        where: unused.
        config: the user's JetFormerConfig, or None: then a preset with these shapes.
        dtype: of the parameters; None keeps the file's.

    Raises:
        UserError: the arrays are not those of a JetFormer, or no preset has their shapes.
    """
    root = _root(checkpoint.shapes)
    if config is None:
        config = _preset(checkpoint, root)
    if not isinstance(config, JetFormerConfig):
        got = type(config).__name__
        raise UserError(f"{checkpoint.path} holds {WHAT}: config must be a JetFormerConfig, got {got}")
    with shapes_only():
        model = JetFormer(config)
    # Components of patches are not among the arrays: they are fitted to pictures, and stay as they begin.
    wanted = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("pca.")}
    tensors = collect(jet_jax.Orders(checkpoint), wanted, sources(checkpoint.shapes, config, root), dtype, root)
    if config.pca is not None:
        tensors |= {f"pca.{name}": buffer for name, buffer in PatchPca(config.pca).named_buffers()}
    model.load_state_dict(tensors, assign=True)
    return model


def _preset(checkpoint: Checkpoint, root: str) -> JetFormerConfig:
    shapes = checkpoint.shapes
    table, head, flow = (tuple(shapes[root + name].shape) for name in (_TABLE, _HEAD, _FLOW + jet_jax.CHANNELS))
    gates = shapes.get(f"{root}{_DECODER}layers/mlp/linear")
    depth = None if gates is None else gates.shape[0]
    for c in PRESETS.values():
        mine = ((c.vocabulary * c.repeats, c.width), (c.width, c.head), (c.flow.depth, c.numbers, c.numbers), c.depth)
        if mine == (table, head, flow, depth):
            return c
    raise UserError(
        f"{checkpoint.path}: no preset has {table[0]} words of width {table[1]}, mixtures of {head[-1]} numbers, "
        f"{flow[0]} couplings and {depth} layers: pass config="
    )


def sources(shapes: Mapping[str, torch.Tensor], c: JetFormerConfig, root: str) -> dict[str, Source]:
    """Parameter of JetFormer -> arrays of a `jet_jax.Orders` whose names begin with `root`."""
    language = gemma_jax.sources(shapes, c.decoder(), root + _DECODER)
    dense = {**linear("embed_image", "EmbedImage"), **linear("image_head", "LogitsImage")}
    if not c.tied:
        dense |= linear("text_head", "LogitsText")
    found = {
        **{f"flow.{name}": source for name, source in jet_jax.sources(c.flow, root + _FLOW).items()},
        **{f"language.{name}": source for name, source in language.items()},
        **{name: Source((root + theirs,), layout) for name, (theirs, layout) in dense.items()},
        "language.model.embed_tokens.weight": same(root + _TABLE),
    }
    if not c.shared_norm:  # the arrays have a common norm nevertheless, which nothing reads
        found |= {f"{kind}_norm.weight": same(f"{root}{kind.capitalize()}Norm/scale") for kind in ("image", "text")}
    return found


def _root(names: Collection[str]) -> str:
    return "params/" if any(name.startswith("params/") for name in names) else ""

"""GIVT's autoencoders with big_vision's names, as in .npz files: the convolutional VAE and that of transformers.

    cnn_encoder/{Conv_i, ResBlock_i, GroupNorm_0}   cnn_decoder/...                                      Vae
    embedding   pos_embedding_{encoder, decoder}   {encoder, decoder}/encoderblock_i/...   encoder_head
    decoder_stem   decoder_head   bottleneck_{downsample, upsample}                                   VitVae

Flax numbers the modules of one kind in the order in which they run. The shapes of a file do not tell everything (the
size of pictures, the labels): a preset with the same shapes does, or `config`.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from vlkern.errors import UserError
from vlkern.interop.big_vision import BLOCK, Table, linear, norm
from vlkern.layers.init import shapes_only
from vlkern.models import vae, vit_vae
from vlkern.models.state import Checkpoint, Source, collect
from vlkern.models.vae import Vae, VaeConfig
from vlkern.models.vit_vae import VitVae, VitVaeConfig

#: What `load_pretrained` says of options for other models.
WHAT = "an autoencoder of GIVT"
_CONV, _VIT = "cnn_encoder/Conv_0/kernel", "pos_embedding_decoder"


def _root(names: Collection[str]) -> str | None:
    """What all names begin with; None when there is neither model."""
    return next((root for root in ("params/", "") for name in (_CONV, _VIT) if root + name in names), None)


def knows(names: Collection[str], entries: Mapping[str, Any]) -> bool:
    """Whether these are the names of one of the autoencoders."""
    root = _root(names)
    return root is not None and (root + _CONV in names or f"{root}decoder_stem/kernel" in names)


def load(
    checkpoint: Checkpoint, entries: Mapping[str, Any], where: Path, config: object, dtype: torch.dtype | None
) -> Vae | VitVae:
    """The model of an .npz file.

    Args:
        checkpoint: its arrays.
        entries: unused: JAX checkpoints have no config.json.
        where: unused.
        config: the user's VaeConfig or VitVaeConfig, or None: then the preset with these shapes.
        dtype: of the parameters; None keeps the file's.

    Raises:
        UserError: the arrays are not those of such a model, or no preset has their shapes.
    """
    root = _root(checkpoint.shapes)
    assert root is not None  # knows() said so
    conv = root + _CONV in checkpoint.shapes
    kind: type = VaeConfig if conv else VitVaeConfig
    if config is None:
        presets: list[Any] = list((vae.PRESETS if conv else vit_vae.PRESETS).values())
        config = next((preset for preset in presets if _fits(checkpoint, preset, root)), None)
        if config is None:
            raise UserError(f"{checkpoint.path} holds {WHAT}, but no preset has its shapes: pass a {kind.__name__}")
    if not isinstance(config, kind):
        raise UserError(
            f"{checkpoint.path} holds {WHAT}: config must be a {kind.__name__}, got {type(config).__name__}"
        )
    model = _empty(config)
    found = sources(model, root)
    model.load_state_dict(collect(checkpoint, model.state_dict(), found, dtype, root), assign=True)
    return model


def _empty(config: Any) -> Vae | VitVae:
    with shapes_only():
        return Vae(config) if isinstance(config, VaeConfig) else VitVae(config)


def _fits(checkpoint: Checkpoint, config: Any, root: str) -> bool:
    """Whether all arrays have the names and shapes of a model with this configuration."""
    shapes = checkpoint.shapes
    if isinstance(config, VaeConfig):
        same = shapes[root + _CONV].shape[-1] == config.network.filters
    else:
        same = tuple(shapes[root + _VIT].shape) == (1, math.prod(config.grid), config.width)
    if not same:  # so that few models are built in vain
        return False
    model = _empty(config)
    wanted, found = model.state_dict(), sources(model, root)
    try:
        return all(
            found[name].make(*(shapes[part] for part in found[name].names)).shape == tensor.shape
            for name, tensor in wanted.items()
        )
    except (KeyError, RuntimeError, IndexError):
        return False


def sources(model: Vae | VitVae, root: str = "") -> dict[str, Source]:
    """Parameter of the model -> arrays whose names begin with `root`."""
    table = _conv_table(model) if isinstance(model, Vae) else _vit_table(model.config)
    return {ours: Source((root + theirs,), layout) for ours, (theirs, layout) in table.items()}


def _same(a: torch.Tensor) -> torch.Tensor:
    return a


def _convolution(kernel: torch.Tensor) -> torch.Tensor:
    return kernel.permute(3, 2, 0, 1)


def _patches(kernel: torch.Tensor) -> torch.Tensor:
    """[P, P, C, D] of a convolution -> [D, P P C]."""
    return kernel.flatten(0, 2).permute(1, 0)


def _conv(ours: str, theirs: str, *, bias: bool = True) -> Table:
    table: Table = {f"{ours}.weight": (f"{theirs}/kernel", _convolution)}
    return {**table, f"{ours}.bias": (f"{theirs}/bias", _same)} if bias else table


def _blocks(names: Iterator[str], level: str, blocks: torch.nn.Module) -> Table:
    """Of the blocks of one level, which take the next folders of `names`."""
    table: Table = {}
    for i, block in enumerate(blocks.children()):
        ours, theirs = f"{level}.{i}", next(names)
        for j in (1, 2):
            table |= norm(f"{ours}.norm{j}", f"{theirs}/GroupNorm_{j - 1}")
            table |= _conv(f"{ours}.conv{j}", f"{theirs}/Conv_{j - 1}", bias=False)
        if block.skip is not None:
            table |= _conv(f"{ours}.skip", f"{theirs}/Conv_2", bias=False)
    return table


def _numbered(folder: str) -> Iterator[str]:
    number = 0
    while True:
        yield f"{folder}{number}"
        number += 1


def _conv_table(model: Vae) -> Table:
    table: Table = {}
    for side in ("encoder", "decoder"):
        part: Any = getattr(model, side)
        convs, blocks = _numbered(f"cnn_{side}/Conv_"), _numbered(f"cnn_{side}/ResBlock_")
        table |= _conv(f"{side}.stem", next(convs), bias=side == "decoder")
        if side == "decoder":
            table |= _blocks(blocks, "decoder.middle", part.middle)
        resizes = "downsamples" if side == "encoder" else "upsamples"
        for level, found in enumerate(part.levels):
            table |= _blocks(blocks, f"{side}.levels.{level}", found)
            if level < len(part.levels) - 1 and getattr(part, resizes)[level].conv is not None:
                table |= _conv(f"{side}.{resizes}.{level}.conv", next(convs))
        if side == "encoder":
            table |= _blocks(blocks, "encoder.middle", part.middle)
        table |= norm(f"{side}.norm", f"cnn_{side}/GroupNorm_0") | _conv(f"{side}.head", next(convs))
    return table


def _vit_table(c: VitVaeConfig) -> Table:
    table = {
        **linear("patch_embedding", "embedding", _patches),
        **linear("encoder_head", "encoder_head"),
        **linear("decoder_stem", "decoder_stem"),
        **linear("decoder_head", "decoder_head"),
    }
    for side, depth in zip(("encoder", "decoder"), c.depths, strict=True):
        table[f"{side}.positions"] = (f"pos_embedding_{side}", lambda rows: rows.squeeze(0))
        table |= norm(f"{side}.norm", f"{side}/encoder_norm")
        for i in range(depth):
            for ours, (theirs, layout) in BLOCK.items():
                table[f"{side}.encoder.layers.{i}.{ours}"] = (f"{side}/encoderblock_{i}/{theirs}", layout)
    if not c.resize:
        table["to_tokens.weight"] = ("bottleneck_downsample", _same)
        table["to_patches.weight"] = ("bottleneck_upsample", _same)
    return table

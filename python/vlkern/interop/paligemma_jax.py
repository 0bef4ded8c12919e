"""PaliGemma with big_vision's names, as in its .npz files: `img`, a SigLIP whose head is the projector, and `llm`."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vlkern.errors import UserError
from vlkern.interop import big_vision, gemma_jax
from vlkern.layers.init import shapes_only
from vlkern.models.multimodal_files import WHAT as WHAT
from vlkern.models.paligemma import PaliGemma, PaliGemmaConfig
from vlkern.models.state import Checkpoint, Source, collect

_IMAGE, _LANGUAGE = "img/", "llm/"


def knows(names: Collection[str], entries: Mapping[str, Any]) -> bool:
    """Whether there are both an image encoder and a language model."""
    root = _root(names)
    return f"{root}{_IMAGE}embedding/kernel" in names and f"{root}{_LANGUAGE}embedder/input_embedding" in names


def load(
    checkpoint: Checkpoint, entries: Mapping[str, Any], where: Path, config: object, dtype: torch.dtype | None
) -> PaliGemma:
    """The model of an .npz file.

    Args:
        checkpoint: its arrays.
        entries: unused: JAX checkpoints have no config.json.
        where: unused.
        config: the user's PaliGemmaConfig, or None: then pictures are square, and the preset of Gemma with these
            shapes tells the rest. The placeholder is the id behind the last row of the table, which has no padding.
        dtype: of the parameters; None keeps the file's.

    Raises:
        UserError: the arrays are not those of a PaliGemma, or no preset has their shapes.
    """
    shapes = checkpoint.shapes
    root = _root(shapes)
    if config is None:
        vision = big_vision.vision_config(checkpoint, root + _IMAGE)
        language = gemma_jax.config_of(checkpoint, root + _LANGUAGE)
        rows = language.vocabulary
        config = PaliGemmaConfig(vision, replace(language, whole_prefix=language.version == 2), rows, rows)
    if not isinstance(config, PaliGemmaConfig):
        got = type(config).__name__
        raise UserError(f"{checkpoint.path} holds a PaliGemma: config must be a PaliGemmaConfig, got {got}")
    with shapes_only():
        model = PaliGemma(config)
    tensors = collect(checkpoint, model.state_dict(), sources(shapes, config, root), dtype, root)
    model.load_state_dict(tensors, assign=True)
    return model


def sources(shapes: Mapping[str, torch.Tensor], c: PaliGemmaConfig, root: str) -> dict[str, Source]:
    """Parameter of PaliGemma -> arrays whose names begin with `root`; `shapes` tells which of the layouts it is."""
    stacked = any(name.startswith(f"{root}{_IMAGE}Transformer/encoderblock/") for name in shapes)
    image = big_vision.encoder_sources(c.vision, root + _IMAGE, stacked=stacked)
    language = gemma_jax.sources(shapes, c.language, root + _LANGUAGE)
    head, linear = f"{root}{_IMAGE}head", "multi_modal_projector.linear"
    return {
        **{f"vision_tower.vision_model.{name}": source for name, source in image.items()},
        f"{linear}.weight": Source((f"{head}/kernel",), lambda kernel: kernel.permute(1, 0)),
        f"{linear}.bias": Source((f"{head}/bias",), lambda bias: bias),
        **{f"language_model.{name}": source for name, source in language.items()},
    }


def _root(names: Collection[str]) -> str:
    return "params/" if any(name.startswith("params/") for name in names) else ""

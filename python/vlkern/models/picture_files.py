"""config.json of the models that make pictures: to and from their configurations. The format is our own."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from torch import nn

from vlkern.errors import UserError
from vlkern.models import fsq_autoencoder, givt, jet, jetformer, m2t, maskgit, state, vae, vit_vae

#: model_type -> (its configuration, a frozen dataclass, maybe of others; its model, made of the configuration alone)
MODELS: dict[str, tuple[Any, Callable[[Any], nn.Module]]] = {
    "fsq": (fsq_autoencoder.FsqConfig, fsq_autoencoder.FsqAutoencoder),
    "givt": (givt.GivtConfig, givt.Givt),
    "jet": (jet.JetConfig, jet.Jet),
    "jetformer": (jetformer.JetFormerConfig, jetformer.JetFormer),
    "m2t": (m2t.M2TConfig, m2t.M2T),
    "maskgit": (maskgit.MaskGitConfig, maskgit.MaskGit),
    "vae": (vae.VaeConfig, vae.Vae),
    "vit_vae": (vit_vae.VitVaeConfig, vit_vae.VitVae),
}
#: What `load_pretrained` says of options for other models.
WHAT = "a model that makes pictures, or files of them"


def knows(names: Collection[str], entries: Mapping[str, Any]) -> bool:
    """Whether config.json says so."""
    return entries.get("model_type") in MODELS


def _type_of(model: nn.Module) -> str | None:
    return next((name for name, (_, kind) in MODELS.items() if type(model) is kind), None)


def is_one(model: nn.Module) -> bool:
    """Whether this is such a model."""
    return _type_of(model) is not None


def to_json(model: Any) -> dict[str, Any]:
    """What config.json says: every field of the configuration."""
    entries = {"model_type": _type_of(model), "architectures": [type(model).__name__]}
    return {**entries, **dataclasses.asdict(model.config)}


def _of_json(kind: Any, entries: Any) -> Any:
    """A configuration from its fields: dataclasses inside it are built as well, lists become tuples."""
    if dataclasses.is_dataclass(kind) and isinstance(entries, dict):
        hints = get_type_hints(kind)
        return kind(**{name: _of_json(hints.get(name), value) for name, value in entries.items()})  # type: ignore[operator]
    if isinstance(entries, dict):  # an optional part: the dataclass among the types that the field may have
        part = next((part for part in get_args(kind) if dataclasses.is_dataclass(part)), None)
        return entries if part is None else _of_json(part, entries)
    if isinstance(entries, list):
        inner = next((part for part in get_args(kind) if part is not Ellipsis), None)
        return tuple(_of_json(inner, entry) for entry in entries)
    return entries


def build(entries: dict[str, Any], file: Path) -> nn.Module:
    """The model that config.json describes; shapes and no numbers when called under `shapes_only`.

    Raises:
        UserError: an entry is missing, left over or out of range. Names the file.
    """
    config, model = MODELS[entries["model_type"]]
    given = {name: value for name, value in entries.items() if name not in ("model_type", "architectures")}
    try:
        return model(_of_json(config, given))
    except (TypeError, ValueError) as error:  # TypeError: an entry that no configuration has, or lacks
        raise UserError(f"{file}: no sizes of a {entries['model_type']} ({error})") from error


def load(
    checkpoint: state.Checkpoint, entries: dict[str, Any], file: Path, config: object, dtype: torch.dtype | None
) -> nn.Module:
    """The model of a folder that `save_pretrained` wrote, on the CPU.

    Args:
        checkpoint: its tensors.
        entries: its config.json.
        file: where that lies, for messages.
        config: must be None, since config.json says everything.
        dtype: of the parameters; None keeps the file's.

    Raises:
        UserError: config.json or the tensors are not those of such a model.
        ValueError: a config is given.
    """
    if config is not None:
        raise ValueError(f"config must be None: {checkpoint.path} is {WHAT}")
    return state.load_same(checkpoint, lambda: build(entries, file), dtype)

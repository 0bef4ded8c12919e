"""Models from checkpoints, and to Hugging Face directories.

A checkpoint is read in three steps, so that nothing is half-loaded: its format by its content, its sizes (config.json,
or the shapes of its tensors), then all of its tensors, once every name, shape and type has been checked.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from vlkern._files import sync
from vlkern.errors import UserError
from vlkern.layers.init import shapes_only
from vlkern.models import (
    gemma,
    gemma3,
    gemma_files,
    givt,
    jet,
    multimodal_files,
    naflex,
    navit,
    navit_files,
    paligemma,
    picture_files,
    siglip,
    state,
    vae,
    vit_vae,
)

Config = (
    siglip.SiglipConfig
    | siglip.VisionConfig
    | naflex.NaflexConfig
    | naflex.NaflexVisionConfig
    | gemma.GemmaConfig
    | paligemma.PaliGemmaConfig
    | gemma3.Gemma3Config
    | jet.JetConfig
    | givt.GivtConfig
    | vae.VaeConfig
    | vit_vae.VitVaeConfig
)
#: What `save_pretrained` takes, besides the models of `picture_files`.
Saved = (
    siglip.Siglip
    | naflex.Naflex
    | navit.Navit
    | navit.NavitClassifier
    | gemma.Gemma
    | paligemma.PaliGemma
    | gemma3.Gemma3
)
#: configuration -> its model
_MODELS: dict[type, Callable[[Any], nn.Module]] = {
    siglip.SiglipConfig: siglip.Siglip,
    siglip.VisionConfig: siglip.VisionTower,
    naflex.NaflexConfig: naflex.Naflex,
    naflex.NaflexVisionConfig: naflex.NaflexVisionTower,
}
_WEIGHTS, _INDEX, _CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def load_pretrained(
    source: str | os.PathLike[str],
    *,
    image_size: tuple[int, int] | int | None = None,
    patch: int | None = None,
    dtype: torch.dtype | None = None,
    config: Config | None = None,
) -> nn.Module:
    """The model that a checkpoint holds, on the CPU.

    Args:
        source: a Hugging Face directory (config.json with model.safetensors, or several files with their index), or one
            file: safetensors with the names of transformers, open_clip or timm, or .npz with those of the JAX code.
        image_size: (H, W), or one number for both: resize the model for such pictures (`siglip.resized`). NaFlex
            models take pictures of any shape, Gemma none or those of its size, and so neither this nor `patch`.
        patch: side of a patch to resize to.
        dtype: of the parameters; None keeps the file's. Parameters that stay as they are in a safetensors file are
            mapped: they take no memory until they are used, and training does not change the file.
        config: what the checkpoint holds, where it does not say: heads of a width that no preset has, a grid of patches
            that is no square.

    Returns:
        Siglip, Naflex, Navit, NavitClassifier, Gemma, PaliGemma, Gemma3 or a model that makes pictures; VisionTower or
        NaflexVisionTower when the checkpoint holds an image tower alone.

    Raises:
        UserError: a ValueError: the checkpoint is missing, cut short, a pickle (which could run code), of another
            model, or its tensors do not fit: all that are missing, left over or of a wrong shape are listed.
        ValueError: the image size is not positive or smaller than a patch, or given for a model that has none; dtype is
            no floating-point type.

    Example:
        >>> model = vlkern.models.load_pretrained("siglip2-base-patch16-256", image_size=384)
    """
    if dtype is not None and dtype not in state.FLOATS:
        raise ValueError(f"dtype must be one of {', '.join(map(str, state.FLOATS))}, got {dtype!r}")
    # Here and not above: the adapters are made of this package's configurations.
    from vlkern.interop import big_vision, open_clip_names, timm, transformers

    path = Path(source)
    checkpoint = _open(path)
    file = (path if path.is_dir() else path.parent) / _CONFIG
    entries = _read_json(file) if file.is_file() else {}
    family = next((f for f in _families() if f.knows(checkpoint.shapes, entries)), None)
    if family is not None:
        for name, value in (("image_size", image_size), ("patch", patch)):
            if value is not None:
                raise ValueError(f"{name} must be None: {path} is {family.WHAT}")
        return family.load(checkpoint, entries, file, config, dtype)
    adapters: tuple[Any, ...] = (transformers, open_clip_names, timm, big_vision)
    adapter = next((a for a in adapters if a.knows(checkpoint.shapes)), None)
    if adapter is None:
        some = ", ".join(list(checkpoint.shapes)[:3]) or "none"
        raise UserError(
            f"{path}: holds no Gemma, PaliGemma or SigLIP with names of transformers, open_clip, timm or big_vision "
            f"({some}, ...)"
        )
    if config is None and adapter is transformers and "model_type" in entries:
        config = transformers.from_json(entries, file)
    try:
        plan = adapter.plan(checkpoint, config)
    except UserError:
        raise
    except ValueError as error:  # sizes that no model can have
        raise UserError(f"{path}: {error}") from error

    c = plan.config
    old = c.vision if isinstance(c, siglip.SiglipConfig | naflex.NaflexConfig) else c
    new = old
    if isinstance(old, siglip.VisionConfig):
        new = siglip.resized_config(old, old.image_size if image_size is None else image_size, patch)
    elif image_size is not None or patch is not None:
        raise ValueError(f"image_size and patch must be None: {path} holds a model for pictures of any shape")
    with shapes_only():
        wanted = _build(c).state_dict()
        model = _build(new if c is old else replace(c, vision=new))
    tensors = state.collect(checkpoint, wanted, plan.sources, dtype, plan.root)
    if isinstance(old, siglip.VisionConfig) and isinstance(new, siglip.VisionConfig):
        siglip.resize_state(tensors, old, new, prefix="" if c is old else "vision_model.")
    model.load_state_dict(tensors, assign=True)
    return model


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    max_shard_size: int = 5_000_000_000,
) -> None:
    """Write config.json and model.safetensors, which `load_pretrained` and transformers' `SiglipModel` read, or for a
    NaFlex model its `Siglip2Model`, for a Gemma its `Gemma*ForCausalLM`, for one that sees `*ForConditionalGeneration`;
    a NaViT or a model that makes pictures is read by `load_pretrained` alone.

    Everything is written under other names first and renamed when it is whole: killed at any moment, the folder holds
    the old model, the new one, or none that can be read; never a mixture. Other files stay.

    Args:
        model: what `load_pretrained` gives, on any device; parameters are written in the dtypes they have.
        folder: is made if need be. transformers itself only reads models whose pictures are square.
        max_shard_size: bytes; a larger model becomes several files and an index, named as at Hugging Face.

    Raises:
        TypeError: `model` is none of these.
        ValueError: its parameters are on the meta device, max_shard_size is not positive, or transformers has no Gemma
            with these options.
        UserError: the folder cannot be written, or the disk is full; what was there before is unchanged.

    Example:
        >>> vlkern.models.save_pretrained(model, "my-siglip")
    """
    from vlkern.interop.transformers import to_json

    paints = picture_files.is_one(model)
    if not isinstance(model, Saved) and not paints:
        kinds = [*get_args(Saved), *(kind for _, kind in picture_files.MODELS.values())]
        known = ", ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"model must be one of {known}, got {type(model).__name__}")
    if isinstance(max_shard_size, bool) or not isinstance(max_shard_size, int) or max_shard_size < 1:
        raise ValueError(f"max_shard_size must be a positive integer, got {max_shard_size!r}")
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    if any(tensor.is_meta for tensor in tensors.values()):
        raise ValueError("model must have data, got parameters on the meta device")
    shards = _shards(tensors, max_shard_size)
    if paints:
        config = picture_files.to_json(model)
    elif isinstance(model, siglip.Siglip | naflex.Naflex):
        config = to_json(model.config, model.logit_scale.dtype)
    elif isinstance(model, gemma.Gemma):
        config = gemma_files.to_json(model.config, model.model.norm.weight.dtype)
    elif isinstance(model, paligemma.PaliGemma | gemma3.Gemma3):
        config = multimodal_files.to_json(model.config, model.language.model.norm.weight.dtype)
    elif isinstance(model, navit.Navit | navit.NavitClassifier):
        config = navit_files.to_json(model)
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / ".writing"
        shutil.rmtree(part, ignore_errors=True)  # left by a process that was killed
        part.mkdir()
        try:
            for name, names in shards.items():
                save_file({key: tensors[key] for key in names}, part / name, metadata={"format": "pt"})
            if len(shards) > 1:
                weight_map = {key: name for name, names in shards.items() for key in names}
                size = sum(tensor.nbytes for tensor in tensors.values())
                index = {"metadata": {"total_size": size}, "weight_map": weight_map}
                (part / _INDEX).write_text(_json(index), encoding="utf-8")
            (part / _CONFIG).write_text(_json(config), encoding="utf-8")
            for name in shards:  # safetensors makes its files for their owner alone
                (part / name).chmod((part / _CONFIG).stat().st_mode & 0o777)
            _publish(part, folder, list(shards))
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot write the model ({getattr(error, 'strerror', None) or error})") from error


def _publish(part: Path, folder: Path, weights: list[str]) -> None:
    """Move whole files into their places, in an order that never leaves a mixture that could be read."""
    for file in part.iterdir():
        sync(file)
    (folder / _INDEX).unlink(missing_ok=True)  # shards without an index are no model
    config, new = folder / _CONFIG, part / _CONFIG
    if config.exists() and config.read_bytes() != new.read_bytes():
        (folder / _WEIGHTS).unlink(missing_ok=True)  # these weights and the new configuration are none either
    new.replace(config)
    for name in [*weights, _INDEX]:
        if (part / name).exists():
            (part / name).replace(folder / name)
    for stale in folder.glob("model*.safetensors"):
        if stale.name not in weights and (stale.name == _WEIGHTS or "-of-" in stale.name):
            stale.unlink()
    sync(folder)  # the new names, too, outlive a power cut


def _shards(tensors: Mapping[str, torch.Tensor], limit: int) -> dict[str, list[str]]:
    """File name -> names of its tensors, filled in order; a tensor larger than the limit is a file by itself."""
    groups: list[list[str]] = [[]]
    room = limit
    for name, tensor in tensors.items():
        if tensor.nbytes > room and groups[-1]:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= tensor.nbytes
    if len(groups) == 1:
        return {_WEIGHTS: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def _families() -> tuple[Any, ...]:
    """Modules that tell their checkpoints by config.json or the names of tensors, and load them."""
    # Here and not above: the adapters are made of this package's configurations.
    from vlkern.interop import gemma_jax, givt_jax, givt_vae_jax, jet_jax, jetformer_jax, paligemma_jax

    return (
        navit_files,
        picture_files,
        gemma_files,
        multimodal_files,
        gemma_jax,
        givt_jax,
        givt_vae_jax,
        jet_jax,
        jetformer_jax,
        paligemma_jax,
    )


def _build(c: Config) -> nn.Module:
    return _MODELS[type(c)](c)


def _open(path: Path) -> state.Checkpoint:
    """The tensors of a file, or of the checkpoint in a directory.

    Raises:
        UserError: there is none that can be read.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or directory")
    if not path.is_dir():
        return state.open_checkpoint(path)
    if (path / _WEIGHTS).exists():
        return state.SafetensorsFiles(path, [path / _WEIGHTS])
    if (path / _INDEX).exists():
        return state.SafetensorsFiles(path, _files_of_index(path / _INDEX))
    files = [file for file in sorted(path.iterdir()) if file.suffix in (".safetensors", ".npz")]
    if len(files) == 1 and "-of-" not in files[0].name:
        return state.open_checkpoint(files[0])
    if not files:
        for file in sorted(path.iterdir()):
            if file.suffix in _PICKLES:
                state.refuse_pickle(file)
    found = f"found {', '.join(file.name for file in files)}" if files else "found no safetensors or .npz file"
    raise UserError(f"{path}: expected {_WEIGHTS} or {_INDEX}, {found}")


def _files_of_index(index: Path) -> list[Path]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index}: expected an object weight_map with the file of every tensor, got {weight_map!r:.80}")
    names = sorted(set(weight_map.values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise UserError(f"{index}: files must lie beside the index, got {', '.join(outside)}")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise UserError(f"{index.parent}: missing {', '.join(missing)}, which {index.name} lists")
    return [index.parent / name for name in names]


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot read ({getattr(error, 'strerror', None) or error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected an object, got {type(content).__name__}")
    return content

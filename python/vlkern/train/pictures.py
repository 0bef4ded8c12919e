"""What the commands `vlkern train RECIPE` of models that make pictures have in common: from options to a run."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from vlkern import data, models
from vlkern._malloc import recycle_memory
from vlkern.errors import UserError
from vlkern.recipes.autoencoders import NoWords
from vlkern.recipes.pictures import AUTOENCODER
from vlkern.train import common
from vlkern.train.ranks import Ranks
from vlkern.train.settings import Settings

#: the options that define a run of any of them
NAMES = (
    "preset", "from_", "data", "flip", "steps", "batch", "lr", "warmup", "weight_decay", "beta2", "clip", "precision",
    "seed",
)  # fmt: skip
#: of those that know classes
CLASSES = (*NAMES, "class_key")
#: pictures in an update, unless --batch says how many
BATCH = 64
_Model = TypeVar("_Model", bound=nn.Module)


def add_data(parser: argparse.ArgumentParser) -> Any:
    """--data and --flip; their group."""
    given = parser.add_argument_group("data")
    given.add_argument("--data", type=Path, nargs="+", metavar="SHARD", help="WebDataset tar files, or folders of them")
    given.add_argument("--flip", action="store_true", default=None, help="mirror half of the pictures")
    return given


def add_class_key(group: Any) -> None:
    """--class-key."""
    group.add_argument(
        "--class-key", metavar="KEY", help="where the class is in the .json; counts up to a slash (category)"
    )


def add_autoencoder(group: Any, of: str) -> None:
    """--autoencoder, the model that `vlkern train OF` gave."""
    group.add_argument(
        "--autoencoder", type=Path, metavar="DIR", help=f"RUN/model of `vlkern train {of}` (that of --from)"
    )


def begin(
    args: argparse.Namespace,
    ranks: Ranks,
    recipe: str,
    names: tuple[str, ...],
    preset: str,
    defaults: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any] | None, Settings]:
    """Take the folder --out: config.json of the run that is resumed or None, and the settings but for its length.

    `defaults` of the recipe come before those of all.
    """
    stored = common.resumed(args, ranks, recipe)
    settings = common.settings_of(args, stored, names, preset, ranks, defaults)
    settings.settle("flip", False)
    if "class_key" in names:
        settings.settle("class_key", "category")
    if ranks.device.type == "cpu":
        recycle_memory()
    return stored, settings


def config_of(settings: Settings, presets: Mapping[str, Any]) -> Any:
    """The configuration that --preset names.

    Raises:
        UserError: there is none of this name.
    """
    name = settings["preset"]
    if name not in presets:
        raise UserError(f"--preset: expected one of {', '.join(presets)}, got {name}")
    return presets[name]


def pretrained(settings: Settings, family: type[_Model]) -> _Model | None:
    """The model of --from in float32; None for a run from scratch.

    Raises:
        UserError: it cannot be read, or is another model.
    """
    origin = settings["from_"]
    return None if origin is None else _load("--from", origin, family)


def model_of(settings: Settings, family: type[_Model], presets: Mapping[str, Any]) -> _Model:
    """The model of --from, or a new one of --preset, the same for the same --seed.

    Raises:
        UserError: it cannot be read or is another model, or there is no such preset.
    """
    model = pretrained(settings, family)
    if model is None:
        config = config_of(settings, presets)
        torch.manual_seed(settings["seed"])
        model = family(config)
    return model


def _load(option: str, folder: Path | str, family: type[_Model]) -> _Model:
    try:
        model = models.load_pretrained(folder, dtype=torch.float32)
    except ValueError as error:
        raise UserError(f"{option}: {error}") from error
    if not isinstance(model, family):
        raise UserError(f"{option} {folder}: expected a {family.__name__}, got {type(model).__name__}")
    return model


def autoencoder(args: argparse.Namespace, settings: Settings, family: type[_Model]) -> _Model:
    """The frozen model of --autoencoder, or that of --from.

    Raises:
        UserError: there is none, it cannot be read, or is another model.
    """
    folder = settings["autoencoder"] or (settings["from_"] and str(Path(settings["from_"]) / AUTOENCODER))
    if not folder:
        raise UserError("--autoencoder: expected a folder with a trained one, got none")
    return _load("--autoencoder", folder, family).eval().requires_grad_(False)


def classes_of(args: argparse.Namespace, settings: Settings, pairs: data.PairShards) -> data.Classes:
    """Those kept with the run, those of --from, or those of the data."""
    kept = args.out / "tokenizer"
    if kept.exists():
        return data.Classes.load(kept)
    return data.Classes.load(settings["from_"]) if settings["from_"] else data.Classes.of(pairs)


def settle_length(args: argparse.Namespace, settings: Settings, pairs: data.PairShards, ranks: Ranks) -> None:
    """Batch, steps and what follows from them. Raises UserError if the batch fits neither pictures nor ranks."""
    settings.settle("batch", min(BATCH, len(pairs) // ranks.world * ranks.world))
    common.settle_length(args, settings, len(pairs), ranks.world)


def run_without_words(
    args: argparse.Namespace,
    ranks: Ranks,
    recipe: str,
    settings: Settings,
    stored: dict[str, Any] | None,
    model: Any,
    task: Callable[..., Any],
) -> None:
    """From a model of pictures alone to its run, or the rest of one.

    Args:
        args: all options.
        ranks: of the run.
        recipe: its name.
        settings: but for the length.
        stored: config.json of the run that is resumed, or None.
        model: `model.config.image_size` is the size of its pictures.
        task: the task of the recipe, from the model on its device, recipe, steps, ranks, pairs and words.

    Raises:
        UserError: data or batch do not fit.
    """
    pairs = common.open_pairs(args, settings, model.config.image_size, stored)
    settle_length(args, settings, pairs, ranks)
    words = NoWords()
    run = common.record(args, ranks, recipe, settings, pairs, words, words.vocabulary, stored)
    made = task(
        model.to(ranks.device), run.recipe, settings["steps"], ranks, pairs, words,
        seed=settings["seed"], workers=args.workers, flip=settings["flip"],
    )  # fmt: skip
    common.carry_out(args, ranks, run, made, pairs)

"""The command `vlkern train paligemma`: its options, and from options to a run."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from vlkern import data, models
from vlkern._malloc import recycle_memory
from vlkern.data.prompts import check_tokenizer
from vlkern.data.tasks import PREFIXES
from vlkern.data.vocabulary import PIECES
from vlkern.errors import UserError
from vlkern.layers.init import dense_
from vlkern.models import paligemma
from vlkern.models.paligemma import PaliGemma
from vlkern.models.siglip import resized_config
from vlkern.recipes.paligemma import PaliGemmaTask
from vlkern.train import common
from vlkern.train.options import positive
from vlkern.train.ranks import Ranks
from vlkern.train.settings import Settings

PRESET = "paligemma-tiny"
#: the options that define a run
NAMES = (*common.NAMES, "image_size", "tasks", "class_key")
#: tokens of a tokenizer that is learned from the answers, its bytes and places among them
TOKENS = 2000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, data and what is learned; the rest is the same for every recipe."""
    model = common.add_start(parser, PRESET)
    model.add_argument("--image-size", type=positive, metavar="S", help="side of the pictures (that of the model)")
    given = common.add_data(parser, PIECES)
    given.add_argument(
        "--tasks", nargs="+", choices=tuple(PREFIXES), metavar="TASK",
        help=f"what is asked: {', '.join(PREFIXES)} (all; without classes not category)",
    )  # fmt: skip
    given.add_argument(
        "--class-key", metavar="KEY", help="where the class is in the .json; counts up to a slash (category)"
    )


def _vocabulary(settings: Settings, tasks: data.Tasks, kept: Path) -> data.Vocabulary:
    """The one kept with the run in the folder `kept`, or that of a new run."""
    source = kept if kept.exists() else settings["tokenizer"] or settings["from_"]
    if source:
        return data.load_vocabulary(source)
    texts = (text for index in range(len(tasks.pairs)) for text in tasks.texts(index))
    questions = (f"{PREFIXES[kind]}\n" for kind in tasks.kinds)
    return data.BytePieces(data.learn_merges([*texts, *questions], TOKENS - data.BytePieces.FIXED))


def _pretrained(settings: Settings) -> PaliGemma:
    """The model of --from, in float32."""
    origin, size = settings["from_"], settings["image_size"]
    try:
        model: Any = models.load_pretrained(origin, image_size=size, dtype=torch.float32)
    except ValueError as error:
        raise UserError(f"--from: {error}") from error
    if not isinstance(model, PaliGemma):
        raise UserError(f"--from {origin}: expected a PaliGemma, got {type(model).__name__}")
    return model


def _config(settings: Settings) -> paligemma.PaliGemmaConfig:
    """Of --preset and --image-size."""
    name, size = settings["preset"], settings["image_size"]
    if name not in paligemma.PRESETS:
        raise UserError(f"--preset: expected one of {', '.join(paligemma.PRESETS)}, got {name}")
    config = paligemma.PRESETS[name]
    try:
        return replace(config, vision=resized_config(config.vision, size, None)) if size else config
    except ValueError as error:
        raise UserError(f"--image-size: {error}") from error


def _tasks(settings: Settings, pairs: data.PairShards, image_size: tuple[int, int], given: Any) -> data.Tasks:
    """What --tasks names; by default what the data has answers to."""
    key = settings["class_key"]
    tasks = data.Tasks(pairs, image_size, class_key=key, augmented=settings["augment"])
    has_classes = any(tasks.category(index) for index in range(len(pairs)))
    if given and "category" in given and not has_classes:
        raise UserError(f"--tasks category: no picture has a class (a string at {key!r} of its .json, see --class-key)")
    settings.settle("tasks", [kind for kind in PREFIXES if has_classes or kind != "category"])
    tasks.kinds = settings["tasks"]
    return tasks


def train(args: argparse.Namespace, ranks: Ranks) -> None:
    """One run, or the rest of one."""
    stored = common.resumed(args, ranks, "paligemma")
    settings = common.settings_of(args, stored, NAMES, PRESET, ranks)
    settings.settle("class_key", "category")
    if ranks.device.type == "cpu":
        recycle_memory()
    model = _pretrained(settings) if settings["from_"] else None
    config = model.config if model else _config(settings)
    pairs = common.open_pairs(args, settings, config.vision.image_size, stored)
    tasks = _tasks(settings, pairs, config.vision.image_size, args.tasks)
    common.settle_length(args, settings, len(pairs), ranks.world)
    vocabulary = _vocabulary(settings, tasks, args.out / "tokenizer")
    if model is None:
        config = config.for_vocabulary(vocabulary.size)
        torch.manual_seed(settings["seed"])
        model = PaliGemma(config)
        # The released models start with a projector of zeros between two trained parts. From scratch that would put
        # RMS norms on vectors of zeros, whose gradients are a thousand times larger than all others.
        dense_(cast("nn.Linear", model.projector.linear), lecun=True)
    else:
        check_tokenizer(vocabulary, config)
    for tower in settings["freeze"]:
        {"image": model.vision, "text": model.language}[tower].requires_grad_(False)
    run = common.record(args, ranks, "paligemma", settings, pairs, vocabulary, vocabulary.size, stored)
    layout = data.Layout(vocabulary, config.image_token, config.image_tokens)
    task = PaliGemmaTask(
        model.to(ranks.device), run.recipe, settings["steps"], ranks, tasks, layout,
        seed=settings["seed"], workers=args.workers,
    )  # fmt: skip
    common.carry_out(args, ranks, run, task, pairs)

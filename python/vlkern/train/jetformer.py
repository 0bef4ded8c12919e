"""The command `vlkern train jetformer`: its options, and from options to a run."""

import argparse
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from vlkern import data
from vlkern.errors import UserError
from vlkern.models.jetformer import PRESETS, SPECIAL, JetFormer
from vlkern.recipes.jetformer import FIRST, JetFormerTask
from vlkern.train import common, pictures
from vlkern.train.options import number
from vlkern.train.ranks import Ranks
from vlkern.train.settings import Settings

PRESET = "jetformer-tiny"
#: the options that define a run
NAMES = (*pictures.CLASSES, "tokenizer", "picture_first", "noise")
#: pictures whose patches the principal components are computed from
FITTED = 2000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, data and what is learned; the rest is the same for every recipe."""
    common.add_start(parser, PRESET)
    given = pictures.add_data(parser)
    pictures.add_class_key(given)
    given.add_argument(
        "--tokenizer", metavar="SOURCE",
        help="of the captions: bytes, or a file or folder with tokenizer.json, *.model or byte_pairs.json (that of "
        "--from; from scratch: byte pairs learned from the captions)",
    )  # fmt: skip
    given.add_argument(
        "--picture-first", type=number(0, 1), metavar="SHARE",
        help="share of the examples whose picture comes first, and its caption is learned (0)",
    )  # fmt: skip
    given.add_argument(
        "--noise", type=number(0), metavar="LEVELS",
        help=f"standard deviation of the noise on the pixels at the first step, in levels of 256; it fades ({FIRST:g})",
    )  # fmt: skip


def _words(args: argparse.Namespace, settings: Settings, config: Any, pairs: data.PairShards) -> Any:
    """Classes, for a model whose texts have one word, or a tokenizer of captions."""
    if config.text_length == 1:
        words: Any = pictures.classes_of(args, settings, pairs)
    else:
        text = SimpleNamespace(length=config.text_length, vocabulary=config.vocabulary - SPECIAL)
        words = common.tokenizer_of(settings, pairs, text, args.out / "tokenizer")
    if settings["from_"] and words.vocabulary != config.vocabulary - SPECIAL:
        known = config.vocabulary - SPECIAL
        raise UserError(f"--from {settings['from_']}: knows {known} words, the data has {words.vocabulary}")
    return words


def _fit(model: JetFormer, pairs: data.PairShards) -> None:
    """Principal components of the patches, if the model works on these."""
    if model.pca is not None:
        some = range(0, len(pairs), max(len(pairs) // FITTED, 1))
        model.pca.fit(data.to_unit(torch.stack([pairs[i].pixels for i in some])))


def train(args: argparse.Namespace, ranks: Ranks) -> None:
    """One run, or the rest of one."""
    stored, settings = pictures.begin(args, ranks, "jetformer", NAMES, PRESET)
    settings.settle("picture_first", 0.0)
    settings.settle("noise", FIRST)
    model = pictures.pretrained(settings, JetFormer)
    config = pictures.config_of(settings, PRESETS) if model is None else model.config
    classes = config.text_length == 1
    if classes and settings["picture_first"]:
        raise UserError("--picture-first: only for models of captions, not of classes")
    key = settings["class_key"] if classes else None
    pairs = common.open_pairs(args, settings, config.image_size, stored, caption_key=key)
    pictures.settle_length(args, settings, pairs, ranks)
    words = _words(args, settings, config, pairs)
    if model is None:
        torch.manual_seed(settings["seed"])
        model = JetFormer(replace(config, vocabulary=words.vocabulary + SPECIAL))
        _fit(model, pairs)
    run = common.record(args, ranks, "jetformer", settings, pairs, words, words.vocabulary, stored)
    task = JetFormerTask(
        model.to(ranks.device), run.recipe, settings["steps"], ranks, pairs, words,
        picture_first=settings["picture_first"], noise=settings["noise"], seed=settings["seed"], workers=args.workers,
        flip=settings["flip"],
    )  # fmt: skip
    common.carry_out(args, ranks, run, task, pairs)

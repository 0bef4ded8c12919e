"""The command `vlkern train maskgit`: its options, and from options to a run."""

import argparse
from dataclasses import replace
from typing import Any

import torch

from vlkern import data
from vlkern.errors import UserError
from vlkern.models.fsq_autoencoder import FsqAutoencoder
from vlkern.models.maskgit import PRESETS, MaskGit, MaskGitConfig
from vlkern.recipes.maskgit import MaskGitTask
from vlkern.train import common, pictures
from vlkern.train.ranks import Ranks

PRESET = "maskgit-tiny"
#: the options that define a run
NAMES = (*pictures.CLASSES, "autoencoder")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model and data; the rest is the same for every recipe."""
    pictures.add_autoencoder(common.add_start(parser, PRESET), "fsq")
    pictures.add_class_key(pictures.add_data(parser))


def config_for(preset: MaskGitConfig, autoencoder: FsqAutoencoder, classes: int) -> MaskGitConfig:
    """The preset, for the tokens of this autoencoder and so many classes."""
    c = autoencoder.config
    return replace(preset, tokens=c.tokens, codes=c.codes, classes=classes, image_size=c.image_size)


def check_fit(model: MaskGit, autoencoder: FsqAutoencoder, classes: data.Classes) -> None:
    """Raise UserError unless the model is one of tokens of this autoencoder and of these classes."""
    c, fitting = model.config, config_for(model.config, autoencoder, model.config.classes)
    if c != fitting:
        raise UserError(
            f"--autoencoder: expected {c.tokens} tokens out of {c.codes} codes of pictures of {c.image_size} pixels, "
            f"got {fitting.tokens} out of {fitting.codes} of {fitting.image_size}"
        )
    if c.classes != classes.vocabulary:
        raise UserError(f"--from: expected a model of {classes.vocabulary} classes, got {c.classes}")


def train(args: argparse.Namespace, ranks: Ranks) -> None:
    """One run, or the rest of one."""
    stored, settings = pictures.begin(args, ranks, "maskgit", NAMES, PRESET)
    autoencoder = pictures.autoencoder(args, settings, FsqAutoencoder)
    model = pictures.pretrained(settings, MaskGit)
    preset: Any = None if model is not None else pictures.config_of(settings, PRESETS)
    pairs = common.open_pairs(args, settings, autoencoder.config.image_size, stored, settings["class_key"])
    classes = pictures.classes_of(args, settings, pairs)
    if model is None:
        torch.manual_seed(settings["seed"])
        model = MaskGit(config_for(preset, autoencoder, classes.vocabulary))
    check_fit(model, autoencoder, classes)
    pictures.settle_length(args, settings, pairs, ranks)
    run = common.record(args, ranks, "maskgit", settings, pairs, classes, classes.vocabulary, stored)
    task = MaskGitTask(
        model.to(ranks.device), run.recipe, settings["steps"], ranks, pairs, classes, autoencoder,
        seed=settings["seed"], workers=args.workers, flip=settings["flip"],
    )  # fmt: skip
    common.carry_out(args, ranks, run, task, pairs)

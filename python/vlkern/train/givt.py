"""The command `vlkern train givt`: its options, and from options to a run."""

import argparse
from dataclasses import replace

import torch

from vlkern import data
from vlkern.errors import UserError
from vlkern.models.givt import PRESETS, Givt, GivtConfig
from vlkern.models.vae import Vae
from vlkern.recipes.givt import GivtTask
from vlkern.train import common, pictures
from vlkern.train.ranks import Ranks

PRESET = "givt-tiny"
#: the options that define a run
NAMES = (*pictures.CLASSES, "autoencoder")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model and data; the rest is the same for every recipe."""
    pictures.add_autoencoder(common.add_start(parser, PRESET), "vae")
    pictures.add_class_key(pictures.add_data(parser))


def config_for(preset: GivtConfig, autoencoder: Vae, classes: int) -> GivtConfig:
    """The preset, for the tokens of this autoencoder and so many classes.

    Raises:
        UserError: the model cannot be made for them.
    """
    if preset.encoder is not None:
        raise UserError("--preset: expected a model of pictures with classes, got one with an encoder of pixels")
    c = autoencoder.config
    adaptor = preset.adaptor and replace(preset.adaptor, channels=c.dim, grid=c.grid)
    try:
        return replace(
            preset, length=c.tokens, channels=c.dim, labels=classes, adaptor=adaptor, image_size=c.image_size
        )
    except ValueError as error:  # an adaptor for an odd number of channels
        raise UserError(f"--autoencoder: {error}") from error


def check_fit(model: Givt, autoencoder: Vae, classes: data.Classes) -> None:
    """Raise UserError unless the model is one of tokens of this autoencoder and of these classes."""
    c, v = model.config, autoencoder.config
    if (c.length, c.channels, c.image_size) != (v.tokens, v.dim, v.image_size):
        raise UserError(
            f"--autoencoder: expected {c.length} tokens of {c.channels} channels of pictures of {c.image_size} pixels, "
            f"got {v.tokens} of {v.dim} of {v.image_size}"
        )
    if not c.unlabelled or c.labels != classes.vocabulary:
        raise UserError(f"--from: expected a model of {classes.vocabulary} classes and none, got {c.labels}")


def train(args: argparse.Namespace, ranks: Ranks) -> None:
    """One run, or the rest of one."""
    stored, settings = pictures.begin(args, ranks, "givt", NAMES, PRESET)
    autoencoder = pictures.autoencoder(args, settings, Vae)
    model = pictures.pretrained(settings, Givt)
    if model is None:
        preset = pictures.config_of(settings, PRESETS)
    pairs = common.open_pairs(args, settings, autoencoder.config.image_size, stored, settings["class_key"])
    classes = pictures.classes_of(args, settings, pairs)
    if model is None:
        config = config_for(preset, autoencoder, classes.vocabulary)
        torch.manual_seed(settings["seed"])
        model = Givt(config)
    check_fit(model, autoencoder, classes)
    pictures.settle_length(args, settings, pairs, ranks)
    run = common.record(args, ranks, "givt", settings, pairs, classes, classes.vocabulary, stored)
    task = GivtTask(
        model.to(ranks.device), run.recipe, settings["steps"], ranks, pairs, classes, autoencoder,
        seed=settings["seed"], workers=args.workers, flip=settings["flip"],
    )  # fmt: skip
    common.carry_out(args, ranks, run, task, pairs)

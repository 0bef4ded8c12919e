"""The command `vlkern train jet`: its options, and from options to a run."""

import argparse
import dataclasses

import torch

from vlkern.errors import UserError
from vlkern.models.jet import PRESETS, Jet
from vlkern.recipes.autoencoders import NoWords
from vlkern.recipes.jet import JetTask, Objective
from vlkern.train import common, pictures
from vlkern.train.ranks import Ranks

PRESET = "jet-tiny"
#: the options that define a run
NAMES = (*pictures.NAMES, "invertible")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model and data; the rest is the same for every recipe."""
    model = common.add_start(parser, PRESET)
    model.add_argument(
        "--invertible", action="store_true", default=None,
        help="keep no activations: compute the inputs of couplings again from their outputs (memory of one coupling, "
        "one pass forward more)",
    )  # fmt: skip
    pictures.add_data(parser)


def train(args: argparse.Namespace, ranks: Ranks) -> None:
    """One run, or the rest of one."""
    stored, settings = pictures.begin(args, ranks, "jet", NAMES, PRESET)
    model = pictures.pretrained(settings, Jet)
    settings.settle("invertible", False)
    if settings["invertible"] and args.parallel != "ddp":
        raise UserError(f"--invertible: needs whole models on every rank (--parallel ddp), got {args.parallel}")
    if model is None:
        config = pictures.config_of(settings, PRESETS)
        torch.manual_seed(settings["seed"])
        model = Jet(config)
    model.config = dataclasses.replace(model.config, invertible=settings["invertible"])
    pairs = common.open_pairs(args, settings, model.config.image_size, stored)
    pictures.settle_length(args, settings, pairs, ranks)
    words = NoWords()
    run = common.record(args, ranks, "jet", settings, pairs, words, words.vocabulary, stored)
    model = model.to(ranks.device)
    task = JetTask(
        model, Objective(model), run.recipe, settings["steps"], ranks, pairs, words,
        seed=settings["seed"], workers=args.workers, flip=settings["flip"],
    )  # fmt: skip
    common.carry_out(args, ranks, run, task, pairs)

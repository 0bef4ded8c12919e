"""The command `vlkern train vae`: its options, and from options to a run."""

import argparse

import torch

from vlkern.models.vae import PRESETS, Vae
from vlkern.recipes.autoencoders import NoWords
from vlkern.recipes.vae import Objective, VaeTask
from vlkern.train import common, pictures
from vlkern.train.options import number
from vlkern.train.ranks import Ranks

PRESET = "vae-tiny"
#: the options that define a run
NAMES = (*pictures.NAMES, "beta")
BETA = 0.01


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, data and loss; the rest is the same for every recipe."""
    common.add_start(parser, PRESET)
    pictures.add_data(parser)
    parser.add_argument_group("loss").add_argument(
        "--beta", type=number(0), metavar="X",
        help=f"weight of the KL divergence against half the squared error of a picture ({BETA})",
    )  # fmt: skip


def train(args: argparse.Namespace, ranks: Ranks) -> None:
    """One run, or the rest of one."""
    stored, settings = pictures.begin(args, ranks, "vae", NAMES, PRESET)
    settings.settle("beta", BETA)
    model = pictures.pretrained(settings, Vae)
    if model is None:
        config = pictures.config_of(settings, PRESETS)
        torch.manual_seed(settings["seed"])
        model = Vae(config)
    pairs = common.open_pairs(args, settings, model.config.image_size, stored)
    pictures.settle_length(args, settings, pairs, ranks)
    words = NoWords()
    run = common.record(args, ranks, "vae", settings, pairs, words, words.vocabulary, stored)
    model = model.to(ranks.device)
    task = VaeTask(
        model, Objective(model, settings["beta"]), run.recipe, settings["steps"], ranks, pairs, words,
        seed=settings["seed"], workers=args.workers, flip=settings["flip"],
    )  # fmt: skip
    common.carry_out(args, ranks, run, task, pairs)

"""The command `vlkern train fsq`: its options, and from options to a run."""

import argparse

import torch

from vlkern.models.fsq_autoencoder import PRESETS, FsqAutoencoder
from vlkern.recipes.autoencoders import NoWords
from vlkern.recipes.fsq import FsqTask, Objective
from vlkern.train import common, pictures
from vlkern.train.ranks import Ranks

PRESET = "fsq-tiny"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model and data; the rest is the same for every recipe."""
    common.add_start(parser, PRESET)
    pictures.add_data(parser)


def train(args: argparse.Namespace, ranks: Ranks) -> None:
    """One run, or the rest of one."""
    stored, settings = pictures.begin(args, ranks, "fsq", pictures.NAMES, PRESET)
    model = pictures.pretrained(settings, FsqAutoencoder)
    if model is None:
        config = pictures.config_of(settings, PRESETS)
        torch.manual_seed(settings["seed"])
        model = FsqAutoencoder(config)
    pairs = common.open_pairs(args, settings, model.config.image_size, stored)
    pictures.settle_length(args, settings, pairs, ranks)
    words = NoWords()
    run = common.record(args, ranks, "fsq", settings, pairs, words, words.vocabulary, stored)
    model = model.to(ranks.device)
    task = FsqTask(
        model, Objective(model), run.recipe, settings["steps"], ranks, pairs, words,
        seed=settings["seed"], workers=args.workers, flip=settings["flip"],
    )  # fmt: skip
    common.carry_out(args, ranks, run, task, pairs)

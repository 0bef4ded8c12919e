"""The command `vlkern train fsq`: its options, and from options to a run."""

import argparse
from typing import Any

from vlkern.models.fsq_autoencoder import PRESETS, FsqAutoencoder
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
    model = pictures.model_of(settings, FsqAutoencoder, PRESETS)

    def task(model: FsqAutoencoder, *given: Any, **options: Any) -> FsqTask:
        return FsqTask(model, Objective(model), *given, **options)

    pictures.run_without_words(args, ranks, "fsq", settings, stored, model, task)

"""The command `vlkern train jet`: its options, and from options to a run."""

import argparse
import dataclasses
from typing import Any

from vlkern.errors import UserError
from vlkern.models.jet import PRESETS, Jet
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
    model = pictures.model_of(settings, Jet, PRESETS)
    settings.settle("invertible", False)
    if settings["invertible"] and args.parallel != "ddp":
        raise UserError(f"--invertible: needs whole models on every rank (--parallel ddp), got {args.parallel}")
    model.config = dataclasses.replace(model.config, invertible=settings["invertible"])

    def task(model: Jet, *given: Any, **options: Any) -> JetTask:
        return JetTask(model, Objective(model), *given, **options)

    pictures.run_without_words(args, ranks, "jet", settings, stored, model, task)

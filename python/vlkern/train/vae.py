"""The command `vlkern train vae`: its options, and from options to a run."""

import argparse
from typing import Any

from vlkern.models.vae import PRESETS, Vae
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
    model = pictures.model_of(settings, Vae, PRESETS)

    def task(model: Vae, *given: Any, **options: Any) -> VaeTask:
        return VaeTask(model, Objective(model, settings["beta"]), *given, **options)

    pictures.run_without_words(args, ranks, "vae", settings, stored, model, task)

"""The command `vlkern train siglip`: its options, and from options to a run."""

import argparse
from dataclasses import replace
from typing import Any

import torch

from vlkern import models
from vlkern.bench.timing import recycle_memory
from vlkern.errors import UserError
from vlkern.models.siglip import Siglip, resized_config
from vlkern.recipes.siglip import SiglipTask
from vlkern.train import common
from vlkern.train.options import image_side
from vlkern.train.ranks import Ranks
from vlkern.train.settings import Settings

PRESET = "siglip-small"
#: the options that define a run
NAMES = (*common.NAMES, "image_size")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model and data; the rest is the same for every recipe."""
    model = common.add_start(parser, PRESET)
    model.add_argument("--image-size", type=image_side, metavar="S", help="side of the pictures (that of the model)")
    common.add_data(parser)


def _model(settings: Settings) -> Siglip:
    """As it is before the first step, in float32."""
    size, origin = settings["image_size"], settings["from_"]
    try:
        if origin:
            model = models.load_pretrained(origin, image_size=size, dtype=torch.float32)
        else:
            with torch.device("meta"):
                shape: Any = models.create(settings["preset"])
            if not isinstance(shape, Siglip):
                raise UserError(f"{settings['preset']} is a {type(shape).__name__}, expected a SigLIP")
            config = shape.config
            if size:
                config = replace(config, vision=resized_config(config.vision, size, None))
            torch.manual_seed(settings["seed"])
            model = Siglip(config)
    except ValueError as error:
        raise UserError(f"{'--from' if origin else '--preset'}: {error}") from error
    if not isinstance(model, Siglip):
        raise UserError(f"--from {origin}: expected both towers of a SigLIP, got {type(model).__name__}")
    return model


def train(args: argparse.Namespace, ranks: Ranks) -> None:
    """One run, or the rest of one."""
    stored = common.resumed(args, ranks, "siglip")
    settings = common.settings_of(args, stored, NAMES, PRESET, ranks)
    if ranks.device.type == "cpu":
        recycle_memory()
    model = _model(settings)
    pairs = common.open_pairs(args, settings, model.config.vision.image_size, stored)
    common.settle_length(args, settings, len(pairs), ranks.world)
    common.prepare_model(model, settings)
    run = common.begin(args, ranks, "siglip", settings, pairs, model.config.text, stored)
    task = SiglipTask(
        model.to(ranks.device), run.recipe, settings["steps"], ranks, pairs, run.tokenizer,
        seed=settings["seed"], workers=args.workers, augmented=settings["augment"],
    )  # fmt: skip
    common.carry_out(args, ranks, run, task, pairs)

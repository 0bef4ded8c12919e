"""The command `vlkern train siglip`: its options, and from options to a run."""

import argparse
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from vlkern import models
from vlkern._malloc import recycle_memory
from vlkern.errors import UserError
from vlkern.models.naflex import Naflex, from_siglip
from vlkern.models.siglip import Siglip, resized_config
from vlkern.recipes.naflex import NaflexTask
from vlkern.recipes.siglip import SiglipTask
from vlkern.train import common
from vlkern.train.options import positive
from vlkern.train.ranks import Ranks
from vlkern.train.settings import Settings

PRESET = "siglip-small"
#: the options that define a run
NAMES = (*common.NAMES, "image_size", "naflex", "max_patches")
#: the preset of --naflex
NAFLEX_PRESET = "naflex-small"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model and data; the rest is the same for every recipe."""
    model = common.add_start(parser, PRESET)
    model.add_argument("--image-size", type=positive, metavar="S", help="side of the pictures (that of the model)")
    common.add_data(parser)
    flexible = parser.add_argument_group("pictures at their own aspect ratio")
    flexible.add_argument(
        "--naflex", action="store_true", default=None,
        help=f"train a NaFlex model ({NAFLEX_PRESET}); one of fixed size is made into one",
    )  # fmt: skip
    flexible.add_argument(
        "--max-patches", type=positive, nargs="+", metavar="N",
        help="the most patches of a picture; of several numbers one is drawn for each step (as many as positions)",
    )  # fmt: skip


def _model(settings: Settings) -> Siglip | Naflex:
    """As it is before the first step, in float32."""
    size, origin = settings["image_size"], settings["from_"]
    try:
        if origin:
            model: Any = models.load_pretrained(origin, image_size=size, dtype=torch.float32)
        else:
            with torch.device("meta"):
                shape: Any = models.create(settings["preset"])
            config = shape.config
            if size and isinstance(shape, Siglip):
                config = replace(config, vision=resized_config(config.vision, size, None))
            elif size:
                raise ValueError(f"{settings['preset']} has no --image-size, but --max-patches")
            torch.manual_seed(settings["seed"])
            model = type(shape)(config)
        if isinstance(model, Siglip) and settings.values.get("naflex"):
            model = from_siglip(model)
    except ValueError as error:
        raise UserError(f"{'--from' if origin else '--preset'}: {error}") from error
    if not isinstance(model, Siglip | Naflex):
        where = f"--from {origin}" if origin else f"--preset {settings['preset']}"
        raise UserError(f"{where}: expected both towers of a SigLIP, got {type(model).__name__}")
    return model


def train(args: argparse.Namespace, ranks: Ranks) -> None:
    """One run, or the rest of one."""
    stored = common.resumed(args, ranks, "siglip")
    settings = common.settings_of(args, stored, NAMES, NAFLEX_PRESET if args.naflex else PRESET, ranks)
    if ranks.device.type == "cpu":
        recycle_memory()
    model = _model(settings)
    if isinstance(model, Naflex):
        settings.settle("max_patches", [model.config.vision.patches])
        size: Any = model.config.vision.patch  # the task reads at other sizes
    elif settings.values.get("max_patches"):
        raise UserError("--max-patches: only for models that take pictures of any shape, see --naflex")
    else:
        size = model.config.vision.image_size
    pairs = common.open_pairs(args, settings, size, stored)
    common.settle_length(args, settings, len(pairs), ranks.world)
    common.prepare_model(model, settings)
    run = common.begin(args, ranks, "siglip", settings, pairs, model.config.text, stored)
    make: Any = SiglipTask
    if isinstance(model, Naflex):
        make = partial(NaflexTask, max_patches=settings["max_patches"])
    task = make(
        model.to(ranks.device), run.recipe, settings["steps"], ranks, pairs, run.tokenizer,
        seed=settings["seed"], workers=args.workers, augmented=settings["augment"],
    )  # fmt: skip
    common.carry_out(args, ranks, run, task, pairs)

"""The command `vlkern train navit`: its options, and from options to a run."""

import argparse
import math
from typing import Any

import torch

from vlkern import data, models
from vlkern._malloc import recycle_memory
from vlkern.data.dropping import Beta, ByLength, BySeen, Constant, Dropping
from vlkern.data.resolution import WAYS
from vlkern.errors import UserError
from vlkern.models.navit import Navit
from vlkern.recipes.navit import NavitTask
from vlkern.train import common
from vlkern.train.options import number
from vlkern.train.ranks import Ranks
from vlkern.train.settings import Settings

PRESET = "navit-small"
#: the options that define a run
NAMES = (*common.NAMES, "resolution", "sampling", "sample", "drop")
#: the smallest and the largest resolution, in patches of a side, when --resolution does not say: 64 to 256 pixels with
#: patches of 16, as in the paper
PATCHES = 4, 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, data and how pictures are seen; the rest is the same for every recipe."""
    common.add_start(parser, PRESET)
    common.add_data(parser)
    views = parser.add_argument_group("views: pictures keep their aspect ratio")
    views.add_argument(
        "--resolution", type=number(0, above=True), nargs=2, metavar=("LOW", "HIGH"),
        help="sides of the squares that have the area of the smallest and the largest view (4 and 16 patches)",
    )  # fmt: skip
    views.add_argument(
        "--sampling", metavar="MEAN",
        help="resolutions between them: `uniform`, or the mean of a normal distribution on [-1, 1] (-0.5)",
    )  # fmt: skip
    views.add_argument("--sample", choices=WAYS, help="what is drawn like that: the side or the area of a view (side)")
    views.add_argument(
        "--drop", metavar="HOW",
        help="share of the patches that a view loses: RATE; beta:MEAN:MOST; length:LOW:HIGH (of the shortest and the "
        "longest views); or seen:FIRST:LAST (in the course of the run) (0)",
    )  # fmt: skip


def dropping_of(how: str, longest: int, shortest: int, examples: int) -> Dropping | None:
    """What --drop asks for.

    Args:
        how: as the option's help says.
        longest: patches of the longest views.
        shortest: patches of the shortest.
        examples: pairs that the run sees.

    Raises:
        UserError: it is none of these.
    """
    name, *words = how.split(":") if ":" in how else ("constant", how)
    expected = f"--drop {how}: expected RATE, beta:MEAN:MOST, length:LOW:HIGH or seen:FIRST:LAST"
    try:
        rates = [float(word) for word in words]
    except ValueError as error:
        raise UserError(expected) from error
    try:
        match name, rates:
            case "constant", [rate]:
                return Constant(rate) if rate else None
            case "beta", [mean, most]:
                return Beta(mean, most)
            case "length", [low, high]:
                return ByLength(low, high, shortest, longest)
            case "seen", [first, last]:
                # In the middle of the run; all but 1.3 % of the change is done when it ends.
                tau = math.copysign(examples / 10, last - first)
                return BySeen(examples / 2, tau, min(rates), max(rates))
    except ValueError as error:
        raise UserError(f"--drop {how}: {error}") from error
    raise UserError(expected)


def _resolutions(settings: Settings, patch: int) -> data.Resolutions:
    """What --resolution, --sampling and --sample ask for."""
    low, high = settings["resolution"]
    if low > high:
        raise UserError(f"--resolution {low:g} {high:g}: expected the smaller one first")
    if low < patch:
        raise UserError(f"--resolution {low:g} {high:g}: expected at least one patch of {patch} pixels")
    sampling = settings["sampling"]
    try:
        mean = None if sampling == "uniform" else float(sampling)
        return data.Resolutions(low, high, mean, settings["sample"])
    except ValueError as error:
        raise UserError(f"--sampling {sampling}: expected `uniform` or a number") from error


def _views(settings: Settings, model: Navit) -> data.Views:
    vision = model.config.vision
    patch = vision.patch
    resolutions = _resolutions(settings, patch)
    shortest, longest = (max(1, int((side / patch) ** 2)) for side in (resolutions.low, resolutions.high))
    dropping = dropping_of(settings["drop"], longest, shortest, settings["steps"] * settings["batch"])
    return data.Views(patch, resolutions, dropping, vision.longest, settings["augment"])


def _model(settings: Settings) -> Navit:
    """As it is before the first step, in float32."""
    origin = settings["from_"]
    try:
        if origin:
            model: Any = models.load_pretrained(origin, dtype=torch.float32)
        else:
            torch.manual_seed(settings["seed"])
            model = models.create(settings["preset"])
    except ValueError as error:
        raise UserError(f"{'--from' if origin else '--preset'}: {error}") from error
    if not isinstance(model, Navit):
        option = f"--from {origin}" if origin else f"--preset {settings['preset']}"
        raise UserError(f"{option}: expected both towers of a NaViT, got {type(model).__name__}")
    return model


def train(args: argparse.Namespace, ranks: Ranks) -> None:
    """One run, or the rest of one."""
    stored = common.resumed(args, ranks, "navit")
    settings = common.settings_of(args, stored, NAMES, PRESET, ranks)
    if ranks.device.type == "cpu":
        recycle_memory()
    model = _model(settings)
    patch = model.config.vision.patch
    settings.settle("resolution", [float(side * patch) for side in PATCHES])
    for name, default in (("sampling", "-0.5"), ("sample", "side"), ("drop", "0")):
        settings.settle(name, default)
    pairs = common.open_pairs(args, settings, patch, stored)
    common.settle_length(args, settings, len(pairs), ranks.world)
    common.prepare_model(model, settings)
    views = _views(settings, model)
    run = common.begin(args, ranks, "navit", settings, pairs, model.config.text, stored)
    task = NavitTask(
        model.to(ranks.device), run.recipe, settings["steps"], ranks, pairs, run.tokenizer, views,
        seed=settings["seed"], workers=args.workers,
    )  # fmt: skip
    common.carry_out(args, ranks, run, task, pairs)

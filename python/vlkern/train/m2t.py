"""The command `vlkern train m2t`: its options, and from options to a run."""

import argparse

from vlkern import data
from vlkern.errors import UserError
from vlkern.models.elic import DOWNSAMPLING
from vlkern.models.m2t import M2T, PRESETS
from vlkern.recipes.autoencoders import NoWords
from vlkern.recipes.m2t import M2TTask, start_from_principal_components
from vlkern.train import common, pictures
from vlkern.train.options import number, positive
from vlkern.train.ranks import Ranks

PRESET = "m2t-small"
#: the options that define a run
NAMES = (*pictures.NAMES, "crop", "shrink")
#: what other recipes do otherwise; bfloat16 would round latents above 256 to even numbers
DEFAULTS = {"batch": 2, "lr": 5e-4, "weight_decay": 0.0, "beta2": 0.99, "clip": 5.0, "precision": "fp32"}
#: crops that principal components are computed from
FITTED = 48


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model and data; the rest is the same for every recipe."""
    common.add_start(parser, PRESET)
    given = pictures.add_data(parser)
    given.add_argument(
        "--crop", type=positive, metavar="PIXELS",
        help=f"side of the squares cut out of the pictures, a multiple of {DOWNSAMPLING} (one tile: m2t-small 256)",
    )  # fmt: skip
    given.add_argument(
        "--shrink", type=number(0, 1, above=True), metavar="X",
        help="make pictures smaller before: by a random factor, from X down to where the crop is their shorter side",
    )  # fmt: skip


def _crop(settings: common.Settings, model: M2T) -> data.RandomCrop:
    """What is seen of a picture. Raises UserError if the model cannot see such squares."""
    settings.settle("crop", DOWNSAMPLING * model.config.tile)
    side = settings["crop"]
    if side % DOWNSAMPLING:
        raise UserError(f"--crop: expected a multiple of {DOWNSAMPLING}, got {side}")
    return data.RandomCrop(side, settings["shrink"])


def _fit(model: M2T, pairs: data.PairShards, seed: int) -> None:
    """Begin as a block transform that suits the pictures."""
    pixels, _ = next(iter(data.batches(pairs, min(FITTED, len(pairs)), tokenizer=NoWords(), seed=seed)))
    start_from_principal_components(model, data.to_unit(pixels))


def train(args: argparse.Namespace, ranks: Ranks) -> None:
    """One run, or the rest of one."""
    stored, settings = pictures.begin(args, ranks, "m2t", NAMES, PRESET, DEFAULTS)
    if settings["precision"] != "fp32":
        raise UserError(f"--precision {settings['precision']}: latents must not be rounded; expected fp32")
    model = pictures.model_of(settings, M2T, PRESETS)
    pairs = common.open_pairs(args, settings, _crop(settings, model), stored, captions=False)
    pictures.settle_length(args, settings, pairs, ranks)
    try:
        if not settings["from_"]:
            _fit(model, pairs, settings["seed"])
        words = NoWords()
        run = common.record(args, ranks, "m2t", settings, pairs, words, words.vocabulary, stored)
        task = M2TTask(
            model.to(ranks.device), run.recipe, settings["steps"], ranks, pairs,
            seed=settings["seed"], workers=args.workers, flip=settings["flip"],
        )  # fmt: skip
        common.carry_out(args, ranks, run, task, pairs)
    except data.DataError as error:
        raise UserError(f"--data, --crop {settings['crop']}: {error}") from error

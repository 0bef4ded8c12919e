"""What the commands `vlkern train RECIPE` have in common: from options to a run."""

import argparse
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import vlkern
from vlkern import data, info
from vlkern._files import write_file
from vlkern._progress import say
from vlkern.data.text import BYTE_PAIRS, FIRST_MERGE
from vlkern.errors import UserError
from vlkern.recipes.contrastive import Recipe
from vlkern.train import loop
from vlkern.train.folder import RunFolder
from vlkern.train.ranks import Ranks
from vlkern.train.settings import Settings
from vlkern.train.task import Task

#: passes over the data when neither --steps nor --examples says how long
PASSES = 100
#: the options that define a run of any of them
NAMES = (
    "preset", "from_", "data", "tokenizer", "augment", "steps", "batch", "lr", "warmup", "weight_decay", "beta2",
    "clip", "precision", "seed", "freeze", "layer_decay",
)  # fmt: skip
#: exp(t') at the start of a run from scratch with fewer steps than SHORT. The papers start at 10 and arrive above 100;
#: a few thousand steps are too few for that way.
TEMPERATURE, SHORT = 25.0, 10_000
TOWERS = {"image": "vision_model", "text": "text_model"}


def add_start(parser: argparse.ArgumentParser, preset: str) -> Any:
    """--preset and --from; the group of options, for what else a model needs."""
    model = parser.add_argument_group("model")
    start = model.add_mutually_exclusive_group()
    start.add_argument("--preset", metavar="NAME", help=f"train from scratch ({preset})")
    start.add_argument("--from", dest="from_", type=Path, metavar="DIR", help="fine-tune the model in this folder")
    return model


def add_data(parser: argparse.ArgumentParser, kept: str = BYTE_PAIRS) -> Any:
    """--data, --tokenizer, which may be the file `kept` of another run, and --augment; their group."""
    given = parser.add_argument_group("data")
    given.add_argument("--data", type=Path, nargs="+", metavar="SHARD", help="WebDataset tar files, or folders of them")
    given.add_argument(
        "--tokenizer", metavar="SOURCE",
        help=f"bytes, or a file or folder with tokenizer.json, *.model or {kept} (that of --from; from "
        "scratch: byte pairs learned from the captions)",
    )  # fmt: skip
    given.add_argument("--augment", action="store_true", default=None, help="change pictures at random")
    return given


def resumed(args: argparse.Namespace, ranks: Ranks, recipe: str) -> dict[str, Any] | None:
    """Take the folder --out: the config.json of the run that is resumed, or None for a new run.

    Raises:
        UserError: the folder cannot be taken, or --resume meets a run of another recipe.
    """
    folder = RunFolder(args.out)
    # The lock lives as long as the folder's object, which the arguments keep.
    args.folder = folder
    stored = ranks.agree(folder.resume if args.resume else folder.begin)
    if stored is not None and stored.get("recipe") != recipe:
        raise UserError(f"--resume: {args.out}/config.json is not of a run of `vlkern train {recipe}`")
    return stored


def settings_of(
    args: argparse.Namespace,
    stored: dict[str, Any] | None,
    names: Sequence[str],
    preset: str,
    ranks: Ranks,
    defaults: Mapping[str, Any] | None = None,
) -> Settings:
    """All but what depends on the data. `defaults` of a recipe come before those of all.

    Raises:
        UserError: options contradict each other or the run that is resumed.
    """
    if getattr(args, "lit", None):
        args.freeze = [*(args.freeze or []), "image"]
    if getattr(args, "freeze", None):
        args.freeze = sorted(set(args.freeze))
        if len(args.freeze) == len(TOWERS):
            raise UserError("--freeze: one tower at most, or nothing is left to train")
    settings = Settings(args, names, stored and stored["options"], moved=("data",))
    if not settings["data"]:
        raise UserError("--data: expected the paths of shards, got none")
    fresh = not settings["from_"]
    if fresh:
        settings.settle("preset", preset)
    defaults = {
        "freeze": [], "augment": False, "lr": 1e-3 if fresh else 1e-4, "weight_decay": 1e-4, "beta2": 0.95, "clip": 1.0,
        "seed": 0, "layer_decay": 1.0, **(defaults or {}),
    }  # fmt: skip
    for name in defaults.keys() & set(names):
        settings.settle(name, defaults[name])
    settings.settle("precision", ranks.agree(lambda: "bf16" if info.fast_bfloat16(ranks.device.type) else "fp32"))
    return settings


def open_pairs(
    args: argparse.Namespace,
    settings: Settings,
    image_size: int | tuple[int, int] | data.RandomCrop,
    stored: dict[str, Any] | None,
    caption_key: str | None = None,
    captions: bool = True,
) -> data.PairShards:
    """The pairs, with the texts at `caption_key`, or all pictures if there need be no `captions`; those that a resumed
    run began with, wherever they lie now.

    Raises:
        UserError: they are others, or cannot be read.
    """
    shards = args.data or [Path(path) for path in settings["data"]]
    pairs = data.PairShards(shards, image_size, caption_key=caption_key, captions=captions)
    if stored and pairs.fingerprint != stored["data"]["fingerprint"]:
        raise UserError(
            "--data: not the pairs that the run began with (names, sizes or numbers of the shards differ); "
            "give those, or begin a new run from its model with --from"
        )
    return pairs


def settle_length(args: argparse.Namespace, settings: Settings, pairs: int, world: int) -> None:
    """Batch, steps and what follows from them.

    Raises:
        UserError: the batch does not fit the pairs or the ranks.
    """
    settings.settle("batch", min(256, pairs // world * world))
    batch = settings["batch"]
    if batch > pairs:
        raise UserError(f"--batch {batch}: there are only {pairs} pairs")
    if batch < 1 or batch % world:
        raise UserError(f"--batch {batch}: must be a multiple of the {world} ranks")
    if args.examples is not None:
        args.steps = -(-args.examples // batch)
        settings.compare("steps", args.steps)
    settings.settle("steps", args.steps or max(PASSES * pairs // batch, 1))
    settings.settle("warmup", min(settings["steps"] // 20, 20_000))


def prepare_model(model: Any, settings: Settings) -> None:
    """Freeze what --freeze names; in short runs from scratch the temperature starts higher."""
    for tower in settings["freeze"]:
        getattr(model, TOWERS[tower]).requires_grad_(False)
    if not settings["from_"] and settings["steps"] < SHORT:
        nn.init.constant_(model.logit_scale, math.log(TEMPERATURE))


def tokenizer_of(settings: Settings, pairs: data.PairShards, text: Any, kept: Path) -> data.Tokenizer:
    """The one kept with the run in the folder `kept`, or that of a new run. `text` has `length` and `vocabulary`.

    Raises:
        UserError: it cannot be read, or has more ids than the model knows.
    """
    source = kept if kept.exists() else settings["tokenizer"] or settings["from_"]
    if not source:
        captions = itertools.chain.from_iterable(map(pairs.captions_of, range(len(pairs))))
        return data.ByteTokenizer(text.length, data.learn_merges(captions, text.vocabulary - FIRST_MERGE))
    tokenizer = data.load_tokenizer(source, text.length)
    try:
        data.check_vocabulary(tokenizer, text.vocabulary)
    except UserError as error:
        raise UserError(f"--tokenizer {source}: {error}") from error
    return tokenizer


def _keep(tokenizer: Any, kept: Path) -> None:
    """Put it into the folder of the run, whole or not at all."""
    if not kept.exists():
        part = kept.with_name(f".{kept.name}.tmp")
        part.mkdir(exist_ok=True)
        tokenizer.save(part)
        part.rename(kept)


@dataclass(frozen=True)
class Run:
    """A run that has been written to config.json, and can be resumed from here on. `tokens` are the tokenizer's ids."""

    identity: dict[str, Any]
    settings: Settings
    tokenizer: Any
    tokens: int
    recipe: Recipe


def begin(
    args: argparse.Namespace,
    ranks: Ranks,
    recipe: str,
    settings: Settings,
    pairs: data.PairShards,
    text: Any,
    stored: dict[str, Any] | None,
) -> Run:
    """Write config.json and the tokenizer of a new run of two towers."""
    tokenizer = tokenizer_of(settings, pairs, text, args.out / "tokenizer")
    return record(args, ranks, recipe, settings, pairs, tokenizer, tokenizer.vocabulary, stored)


def record(
    args: argparse.Namespace,
    ranks: Ranks,
    recipe: str,
    settings: Settings,
    pairs: data.PairShards,
    tokenizer: Any,
    tokens: int,
    stored: dict[str, Any] | None,
) -> Run:
    """Write config.json and the tokenizer, with so many ids, of a new run. `recipe` is its name."""
    identity = {
        "recipe": recipe,
        "options": settings.values,
        "data": {"fingerprint": pairs.fingerprint, "pairs": len(pairs)},
    }
    if stored is None:
        versions = {"vlkern": vlkern.__version__, "torch": torch.__version__}
        content = json.dumps({**identity, "versions": versions}, indent=2) + "\n"
        ranks.agree(lambda: write_file(args.out / "config.json", content.encode()))
    ranks.agree(lambda: _keep(tokenizer, args.out / "tokenizer"))
    hyper = Recipe(
        batch=settings["batch"], rate=settings["lr"], weight_decay=settings["weight_decay"],
        betas=(0.9, settings["beta2"]), clip=settings["clip"], warm_up=settings["warmup"],
        scalar_rate=1.0 if settings["from_"] else 10.0, layer_decay=settings.values.get("layer_decay", 1.0),
    )  # fmt: skip
    return Run(identity, settings, tokenizer, tokens, hyper)


def _contents(count: int, run: Run) -> str:
    """So many pictures, and what goes with them."""
    if isinstance(run.tokenizer, data.Classes):
        return f"{count} pictures of {run.tokens} classes"
    return f"{count} pairs, {run.tokens} tokens" if run.tokens else f"{count} pictures"


def carry_out(args: argparse.Namespace, ranks: Ranks, run: Run, task: Task, pairs: data.PairShards) -> None:
    """Say what is going to happen, and train."""
    settings = run.settings
    plan = loop.Plan(
        steps=settings["steps"], batch=run.recipe.batch, clip=run.recipe.clip,
        autocast=settings["precision"] == "bf16", parallel=args.parallel, seed=settings["seed"],
        save_every=args.save_every, keep=args.keep, log_every=args.log_every,
    )  # fmt: skip
    if ranks.first:
        count = sum(p.numel() for p in task.model.parameters() if p.requires_grad)
        name = settings["from_"] or settings["preset"]
        say("model", f"{name}, {count / 1e6:.1f} M parameters to train, {settings['precision']}, {ranks}")
        say("data", _contents(len(pairs), run))
        say("run", f"{plan.steps} steps of {plan.batch} examples in {args.out}")
    loop.train(task, plan, ranks, args.out, json.dumps(run.identity))
    if ranks.first:
        say("wrote", str(args.out / "model"))

"""The command `vlkern train siglip`: its options, and from options to a run."""

import argparse
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import vlkern
from vlkern import data, info, models
from vlkern._files import write_file
from vlkern.bench.timing import recycle_memory
from vlkern.data.text import FIRST_MERGE
from vlkern.errors import UserError
from vlkern.models.siglip import Siglip, resized_config
from vlkern.recipes.contrastive import Recipe
from vlkern.recipes.siglip import SiglipTask
from vlkern.train import loop
from vlkern.train.folder import RunFolder
from vlkern.train.options import image_side
from vlkern.train.progress import say
from vlkern.train.ranks import Ranks
from vlkern.train.settings import Settings

PRESET = "siglip-small"
#: passes over the data when neither --steps nor --examples says how long
PASSES = 100
#: the options that define a run
NAMES = (
    "preset", "from_", "data", "tokenizer", "image_size", "augment", "steps", "batch", "lr", "warmup", "weight_decay",
    "beta2", "clip", "precision", "seed", "freeze", "layer_decay",
)  # fmt: skip
#: exp(t') at the start of a run from scratch with fewer steps than SHORT. The papers start at 10 and arrive above 100;
#: a few thousand steps are too few for that way.
TEMPERATURE, SHORT = 25.0, 10_000
TOWERS = {"image": "vision_model", "text": "text_model"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model and data; the rest is the same for every recipe."""
    model = parser.add_argument_group("model")
    start = model.add_mutually_exclusive_group()
    start.add_argument("--preset", metavar="NAME", help=f"train from scratch ({PRESET})")
    start.add_argument("--from", dest="from_", type=Path, metavar="DIR", help="fine-tune the model in this folder")
    model.add_argument("--image-size", type=image_side, metavar="S", help="side of the pictures (that of the model)")
    given = parser.add_argument_group("data")
    given.add_argument("--data", type=Path, nargs="+", metavar="SHARD", help="WebDataset tar files, or folders of them")
    given.add_argument(
        "--tokenizer", metavar="SOURCE",
        help="bytes, or a file or folder with tokenizer.json, *.model or byte_pairs.json (that of --from; from "
        "scratch: byte pairs learned from the captions)",
    )  # fmt: skip
    given.add_argument("--augment", action="store_true", default=None, help="change pictures at random")


def _model(settings: Settings) -> Siglip:
    """As it is before the first step, in float32."""
    size, origin = settings["image_size"], settings["from_"]
    try:
        if origin:
            model = models.load_pretrained(origin, image_size=size, dtype=torch.float32)
        else:
            with torch.device("meta"):
                config: Any = models.create(settings["preset"]).config
            if size:
                config = replace(config, vision=resized_config(config.vision, size, None))
            torch.manual_seed(settings["seed"])
            model = Siglip(config)
    except ValueError as error:
        raise UserError(f"{'--from' if origin else '--preset'}: {error}") from error
    if not isinstance(model, Siglip):
        raise UserError(f"--from {origin}: expected both towers of a SigLIP, got {type(model).__name__}")
    for tower in settings["freeze"]:
        getattr(model, TOWERS[tower]).requires_grad_(False)
    return model


def _tokenizer(settings: Settings, pairs: data.PairShards, model: Siglip, kept: Path) -> data.Tokenizer:
    """The one kept with the run in the folder `kept`, or that of a new run."""
    text = model.config.text
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


def _keep(tokenizer: data.Tokenizer, kept: Path) -> None:
    """Put it into the folder of the run, whole or not at all."""
    if not kept.exists():
        part = kept.with_name(f".{kept.name}.tmp")
        part.mkdir(exist_ok=True)
        tokenizer.save(part)
        part.rename(kept)


def _data(
    args: argparse.Namespace, settings: Settings, model: Siglip, stored: dict[str, Any] | None
) -> data.PairShards:
    """The pairs; those that a resumed run began with, wherever they lie now."""
    shards = args.data or [Path(path) for path in settings["data"]]
    pairs = data.PairShards(shards, model.config.vision.image_size)
    if stored and pairs.fingerprint != stored["data"]["fingerprint"]:
        raise UserError(
            "--data: not the pairs that the run began with (names, sizes or numbers of the shards differ); "
            "give those, or begin a new run from its model with --from"
        )
    return pairs


def _settings(args: argparse.Namespace, stored: dict[str, Any] | None) -> Settings:
    """All but what depends on the data."""
    if args.lit:
        args.freeze = [*(args.freeze or []), "image"]
    if args.freeze:
        args.freeze = sorted(set(args.freeze))
        if len(args.freeze) == len(TOWERS):
            raise UserError("--freeze: one tower at most, or nothing is left to train")
    settings = Settings(args, NAMES, stored and stored["options"], moved=("data",))
    if not settings["data"]:
        raise UserError("--data: expected the paths of shards, got none")
    fresh = not settings["from_"]
    if fresh:
        settings.settle("preset", PRESET)
    defaults = {
        "freeze": [], "augment": False, "lr": 1e-3 if fresh else 1e-4, "weight_decay": 1e-4, "beta2": 0.95, "clip": 1.0,
        "seed": 0, "layer_decay": 1.0,
    }  # fmt: skip
    for name, value in defaults.items():
        settings.settle(name, value)
    return settings


def _length(args: argparse.Namespace, settings: Settings, pairs: int, world: int) -> None:
    """Batch, steps and what follows from them."""
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


def _precision(device: torch.device) -> str:
    """bf16 where matmuls are faster in it."""
    return "bf16" if info.fast_bfloat16(device.type) else "fp32"


def train(args: argparse.Namespace, ranks: Ranks) -> None:
    """One run, or the rest of one."""
    folder = RunFolder(args.out)
    stored = ranks.agree(folder.resume if args.resume else folder.begin)
    if stored is not None and stored.get("recipe") != "siglip":
        raise UserError(f"--resume: {args.out}/config.json is not of a run of `vlkern train siglip`")
    settings = _settings(args, stored)
    settings.settle("precision", ranks.agree(lambda: _precision(ranks.device)))
    if ranks.device.type == "cpu":
        recycle_memory()
    model = _model(settings)
    pairs = _data(args, settings, model, stored)
    _length(args, settings, len(pairs), ranks.world)
    if not settings["from_"] and settings["steps"] < SHORT:
        torch.nn.init.constant_(model.logit_scale, math.log(TEMPERATURE))
    identity = {
        "recipe": "siglip",
        "options": settings.values,
        "data": {"fingerprint": pairs.fingerprint, "pairs": len(pairs)},
    }
    kept = args.out / "tokenizer"
    tokenizer = _tokenizer(settings, pairs, model, kept)
    if stored is None:
        versions = {"vlkern": vlkern.__version__, "torch": torch.__version__}
        text = json.dumps({**identity, "versions": versions}, indent=2) + "\n"
        # From here on the run can be resumed.
        ranks.agree(lambda: write_file(args.out / "config.json", text.encode()))
    ranks.agree(lambda: _keep(tokenizer, kept))
    recipe = Recipe(
        batch=settings["batch"], rate=settings["lr"], weight_decay=settings["weight_decay"],
        betas=(0.9, settings["beta2"]), clip=settings["clip"], warm_up=settings["warmup"],
        scalar_rate=1.0 if settings["from_"] else 10.0, layer_decay=settings["layer_decay"],
    )  # fmt: skip
    task = SiglipTask(
        model.to(ranks.device), recipe, settings["steps"], ranks, pairs, tokenizer,
        seed=settings["seed"], workers=args.workers, augmented=settings["augment"],
    )  # fmt: skip
    plan = loop.Plan(
        steps=settings["steps"], batch=recipe.batch, clip=recipe.clip, autocast=settings["precision"] == "bf16",
        parallel=args.parallel, seed=settings["seed"], save_every=args.save_every, keep=args.keep,
        log_every=args.log_every,
    )  # fmt: skip
    if ranks.first:
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        name = settings["from_"] or settings["preset"]
        say("model", f"{name}, {count / 1e6:.1f} M parameters to train, {settings['precision']}, {ranks}")
        say("data", f"{len(pairs)} pairs, {tokenizer.vocabulary} tokens")
        say("run", f"{plan.steps} steps of {plan.batch} pairs in {args.out}")
    loop.train(task, plan, ranks, args.out, json.dumps(identity))
    if ranks.first:
        say("wrote", str(args.out / "model"))

"""`vlkern demo`: read, train, search, measure loss and packing, write the report."""

import argparse
import itertools
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from vlkern import backends, data, info, models, ops
from vlkern._malloc import recycle_memory
from vlkern._progress import say
from vlkern.data.text import FIRST_MERGE
from vlkern.demo import opbench, packing, report, training
from vlkern.demo.progress import Bar
from vlkern.errors import UserError
from vlkern.evaluation.encoder import Encoder
from vlkern.evaluation.retrieval import Retrieval
from vlkern.evaluation.tasks import retrieve
from vlkern.models.siglip import Siglip
from vlkern.recipes.contrastive import Recipe
from vlkern.search.hits import best

MODEL = "siglip-tiny"
RECIPE = Recipe(batch=256, rate=1e-3, betas=(0.9, 0.98), warm_up=40, scalar_rate=10)
STEPS, MINUTES = 800, 3.2
#: exp(t') at the start. The papers start at 10 and arrive above 100; a few hundred steps are too few for that way.
TEMPERATURE = 25.0
QUERIES = ("flag", "road sign", "bird")


def _whole(low: int, high: int) -> Callable[[str], int]:
    """For argparse: a whole number within these limits."""

    def parse(value: str) -> int:
        try:
            number = int(value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number, got {value!r}") from None
        if number < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, got {value}")
        if number > high:
            raise argparse.ArgumentTypeError(f"must be at most {high}, got {value}")
        return number

    return parse


def _minutes(value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {value!r}") from None
    if not number >= 0.01:
        raise argparse.ArgumentTypeError(f"must be at least 0.01, got {value}")
    if number > 1e6:
        raise argparse.ArgumentTypeError(f"must be at most 1e6, got {value}")
    return number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vlkern demo`."""

    def add(flag: str, kind: Callable[[str], object], default: object, shown: str, text: str) -> None:
        parser.add_argument(flag, type=kind, default=default, metavar=shown, help=text)

    add(
        "--minutes",
        _minutes,
        MINUTES,
        "M",
        f"train for at most M minutes (default: {MINUTES:g}); the rest takes half a minute",
    )
    add("--steps", _whole(1, 10**9), STEPS, "N", f"train for at most N steps (default: {STEPS})")
    add("--seed", _whole(0, 2**63 - 1), 0, "N", "of parameters, batches and augmentation (default: 0)")
    add("--data", Path, None, "DIR", "folder with train.tar and test.tar (default: the set that comes along)")
    add("--out", Path, Path("demo"), "DIR", "where report.html goes (default: demo)")
    quoted = ", ".join(map(repr, QUERIES))
    parser.add_argument("--queries", nargs="+", default=QUERIES, metavar="TEXT", help=f"searches (default: {quoted})")


def _writable(folder: Path) -> Path:
    """The page's path; that it cannot be written is said before the training, not after it."""
    page = folder / "report.html"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        page.open("a").close()
        if page.stat().st_size == 0:
            page.unlink()
    except OSError as error:
        raise UserError(f"--out {folder}: cannot write report.html there ({error.strerror})") from error
    return page


def _load(folder: Path, side: int) -> tuple[data.Pairs, data.Pairs]:
    learn, held_out = (data.load_pairs([folder / name], side) for name in ("train.tar", "test.tar"))
    say("data", f"{len(learn)} pictures to learn from, {len(held_out)} held out ({folder})")
    for line in learn.skipped + held_out.skipped:
        say("", f"left out: {line}")
    return learn, held_out


def _explain(model: Siglip, batch: int) -> backends.Explanation:
    """Which backend runs the loss of a training step, and why not the others."""
    x = torch.zeros(batch, model.config.vision.width, device=model.logit_scale.device)
    explanation = backends.explain(ops.sigmoid_contrastive_loss, x, x, 10.0, -10.0)
    say("backend", str(explanation).replace("\n", "\n" + " " * 10))
    return explanation


def _percent(value: Callable[[int], float]) -> str:
    return "  ".join(f"@{k} {100 * value(k):4.1f} %" for k in (1, 5, 10))


def _show_retrieval(found: Retrieval) -> None:
    to_image, to_text = found.text_to_image, found.image_to_text
    times = to_image.recall(10) / to_image.chance(10)
    say("recall", f"text to image {_percent(to_image.recall)}   ({times:.1f}x chance at 10)")
    say("", f"image to text {_percent(to_text.recall)}")
    say("", f"chance        {_percent(to_image.chance)}   ({found.pictures} held-out pictures, first captions)")


def _measure(dtype: torch.dtype, device: str) -> list[opbench.Point]:
    say("loss", f"by itself, forward and backward, {str(dtype).removeprefix('torch.')}, D={opbench.WIDTH}")
    points: list[opbench.Point] = []
    for point in opbench.sweep(dtype, device, opbench.BATCHES):
        cells = [
            f"{name} {point.milliseconds[name]:7.1f} ms {point.extra_bytes[name] / 2**20:7.1f} MiB extra"
            for name in ("fused", "eager")
        ]
        say("", f"B={point.batch:<5} {'   '.join(cells)}   {point.speedup:.1f}x")
        points.append(point)
    return points


def _pack(files: list[bytes], dtype: torch.dtype, device: str) -> packing.Packing:
    p = packing.measure(files, dtype, device)
    waste = f"padded {p.slots} tokens, {100 * p.wasted:.0f} % of them pads; packed {p.tokens}"
    say("packing", f"{p.pictures} pictures, {packing.MODEL}: {waste}")
    rates = "   ".join(f"{form} {p.rate(form):7.1f} pictures/s" for form in ("packed", "padded"))
    say("", f"{rates}   {p.speedup:.2f}x")
    return p


def run(args: argparse.Namespace) -> int:
    """Runs the demo. Raises UserError for data that cannot be read or a folder that cannot be written."""
    start = time.perf_counter()
    page = _writable(args.out)
    recycle_memory()
    config = models.siglip.PRESETS[MODEL]
    learn, held_out = _load(args.data or data.clipart_mini(), config.vision.image_size[0])
    merges = data.learn_merges(itertools.chain(*learn.captions), config.text.vocabulary - FIRST_MERGE)
    tokenizer = data.ByteTokenizer(config.text.length, merges)

    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    autocast = info.fast_bfloat16(device)
    model = Siglip(config).to(device)
    torch.nn.init.constant_(model.logit_scale, math.log(TEMPERATURE))
    size = (
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {'bfloat16' if autocast else 'float32'}"
    )
    say("model", f"{MODEL}, {size}, {device}, {os.cpu_count()} cores")
    batches = training.Batches(learn, tokenizer, RECIPE.batch, args.seed)
    explanation = _explain(model, batches.batch)

    budget = training.Budget(args.steps, 60 * args.minutes)
    with Bar() as bar:
        history = training.train(model, RECIPE, batches, budget, autocast=autocast, show=bar.update)
    trained = f"{len(history.losses)} steps of {batches.batch} pairs"
    timed = f"{sum(history.seconds):.0f} s, {1e3 * history.median_seconds:.0f} ms a step (median)"
    say("trained", f"{trained} in {timed}, loss {history.losses[0]:.2f} -> {report.smooth(history.losses)[-1]:.2f}")

    encoder = Encoder(model, tokenizer, device=device)
    images = torch.cat([encoder.images(part) for part in held_out.pixels.split(100)])
    found = retrieve(encoder, images, [captions[:1] for captions in held_out.captions])
    _show_retrieval(found)
    answers = best(encoder, images, args.queries, count=8)
    for query, hits in zip(args.queries, answers, strict=True):
        say("search", f"{query!r}: {'; '.join(held_out.captions[hit.picture][0] for hit in hits[:5])}")
    dtype = torch.bfloat16 if autocast else torch.float32
    points = _measure(dtype, device)
    packed = _pack(held_out.files, dtype, device)

    at_10 = found.text_to_image.recall(10)
    facts = {
        "Model": size,
        "Pictures": f"{len(learn)}, and {len(held_out)} held out",
        "Training": trained,
        "Time": timed,
        "Backend of the loss": explanation.backend,
        "Recall@10, text to image": f"{100 * at_10:.1f} % (chance {100 * found.text_to_image.chance(10):.1f} %)",
    }
    story = report.Story(
        facts, history, found, held_out, args.queries, answers, points, str(explanation), packed, dtype
    )
    page.write_text(report.page(story), encoding="utf-8")
    say("wrote", f"{page} after {time.perf_counter() - start:.0f} s")
    return 0

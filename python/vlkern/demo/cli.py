"""`vlkern demo`: read, train, measure the loss, search, write the report."""

import argparse
import os
import time
from pathlib import Path

import torch

from vlkern import backends, data, info, models, ops
from vlkern.bench.timing import recycle_memory
from vlkern.demo import opbench, report, search, training
from vlkern.demo.progress import Bar
from vlkern.errors import UserError
from vlkern.models.siglip import Siglip
from vlkern.recipes.contrastive import Recipe

MODEL = "siglip-tiny"
RECIPE = Recipe(batch=256, rate=1e-3, weight_decay=0.1, betas=(0.9, 0.98))
STEPS, MINUTES = 600, 3.0
QUERIES = ("playing card", "weather symbol", "bird")


def _at_least(least: float, kind: type[float] | type[int]) -> object:
    def parse(value: str) -> float:
        try:
            number = kind(value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a number, got {value!r}") from None
        if not least <= number < float("inf"):
            raise argparse.ArgumentTypeError(f"must be at least {least:g} and finite, got {value}")
        return number

    return parse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vlkern demo`."""
    add = parser.add_argument
    add("--minutes", type=_at_least(0.01, float), default=MINUTES, metavar="M",
        help=f"train for at most M minutes (default: {MINUTES:g}); the rest of the demo takes about half a minute")  # fmt: skip
    add(
        "--steps",
        type=_at_least(1, int),
        default=STEPS,
        metavar="N",
        help=f"train for at most N steps (default: {STEPS})",
    )
    add(
        "--seed",
        type=_at_least(0, int),
        default=0,
        metavar="N",
        help="of parameters, batches and augmentation (default: 0)",
    )
    add(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder with train.tar and test.tar (default: the set that comes along)",
    )
    add("--queries", nargs="+", default=list(QUERIES), metavar="TEXT", help="searches (default: %(default)s)")
    add("--out", type=Path, default=Path("demo"), metavar="DIR", help="where report.html goes (default: demo)")


def _writable(folder: Path) -> Path:
    """Known before the training, not after it."""
    page = folder / "report.html"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with page.open("a"):
            pass
    except OSError as error:
        raise UserError(f"--out {folder}: cannot write report.html there ({error.strerror})") from error
    return page


def _device() -> tuple[str, bool]:
    """The device, and whether its bfloat16 matmuls are faster than float32."""
    if torch.cuda.is_available():
        return "cuda", torch.cuda.is_bf16_supported()
    return "cpu", "AMX BF16" in info.cpu_features()


def _explain(model: Siglip, batch: int) -> backends.Explanation:
    """Which backend runs the loss of a training step, and why not the others."""
    x = torch.zeros(batch, model.config.vision.width, device=model.logit_scale.device)
    return backends.explain(ops.sigmoid_contrastive_loss, x, x, 10.0, -10.0)


def _percent(values: dict[int, float]) -> str:
    return "  ".join(f"@{k} {100 * v:4.1f} %" for k, v in values.items())


def _say(label: str, text: str) -> None:
    print(f"{label:<10}{text}", flush=True)


def _measure(device: str) -> list[opbench.Point]:
    points = []
    for point in opbench.sweep(torch.float32, device):
        points.append(point)
        ms, extra = point.milliseconds, {name: b / 2**20 for name, b in point.extra_bytes.items()}
        _say(
            "loss" if len(points) == 1 else "",
            f"B={point.batch:<5} fused {ms['fused']:7.1f} ms {extra['fused']:7.1f} MiB extra   "
            f"eager {ms['eager']:7.1f} ms {extra['eager']:7.1f} MiB extra   {ms['eager'] / ms['fused']:.1f}x faster",
        )
    return points


def run(args: argparse.Namespace) -> int:
    """Runs the demo. Raises UserError for data that cannot be read or a folder that cannot be written."""
    start = time.perf_counter()
    page = _writable(args.out)
    recycle_memory()
    folder = args.data or data.clipart_mini()
    config = models.siglip.PRESETS[MODEL]
    tokenizer = data.ByteTokenizer(config.text.length)
    learn, held_out = (
        data.load_pairs([folder / name], config.vision.image_size[0]) for name in ("train.tar", "test.tar")
    )
    _say("data", f"{len(learn)} pictures to learn from, {len(held_out)} held out ({folder})")
    for line in learn.skipped + held_out.skipped:
        _say("", f"left out: {line}")

    torch.manual_seed(args.seed)
    device, autocast = _device()
    model = Siglip(config).to(device)
    batches = training.Batches(learn, tokenizer, RECIPE.batch, args.seed)
    million = sum(p.numel() for p in model.parameters()) / 1e6
    precision = "bfloat16 autocast" if autocast else "float32"
    _say("model", f"{MODEL}, {million:.1f} M parameters, {precision}, {device}, {os.cpu_count()} cores")
    explanation = _explain(model, batches.batch)
    _say("backend", str(explanation).replace("\n", "\n" + " " * 10))

    budget = training.Budget(args.steps, 60 * args.minutes)
    with Bar(budget) as bar:
        history = training.train(model, RECIPE, batches, budget, autocast=autocast, show=bar.update)
    losses, seconds = report.smooth(history.losses), sum(history.seconds)
    step = sorted(history.seconds)[len(history.seconds) // 2]
    _say("trained", f"{len(losses)} steps of {batches.batch} pairs in {seconds:.0f} s, {1e3 * step:.0f} ms a step "
         f"(median), loss {history.losses[0]:.2f} -> {losses[-1]:.2f}")  # fmt: skip

    images = search.embed_pictures(model, held_out)
    found = search.retrieval(model, tokenizer, held_out, images)
    _say(
        "recall",
        f"text to image {_percent(found.text_to_image)}   ({found.text_to_image[10] / found.chance(10):.1f}x chance at 10)",
    )
    _say("", f"image to text {_percent(found.image_to_text)}")
    _say("", f"chance        {_percent({k: found.chance(k) for k in found.text_to_image})}   "
         f"({len(held_out)} held-out pictures, first captions)")  # fmt: skip
    answers = search.search(model, tokenizer, images, args.queries)
    for query, answer in zip(args.queries, answers, strict=True):
        _say("search", f"{query!r}: {'; '.join(held_out.captions[i][0] for i, _ in answer[:5])}")
    points = _measure(device)

    facts = {
        "Model": f"{million:.1f} M parameters, {precision}",
        "Pictures": f"{len(learn)}, and {len(held_out)} held out",
        "Training": f"{len(losses)} steps of {batches.batch} pairs",
        "Time": f"{seconds:.0f} s, {1e3 * step:.0f} ms a step",
        "Backend of the loss": explanation.backend,
        "Recall@10, text to image": f"{100 * found.text_to_image[10]:.1f} %, {found.text_to_image[10] / found.chance(10):.1f}x chance",
    }
    story = report.Story(facts, history, found, held_out, args.queries, answers, points, str(explanation), "float32")
    page.write_text(report.page(story), encoding="utf-8")
    _say("wrote", f"{page} after {time.perf_counter() - start:.0f} s")
    return 0

"""Figures of an evaluation, as PNG and SVG: recall over k, languages, classes; chance is always drawn."""

import io
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vlkern.evaluation.retrieval import Direction, Retrieval

OURS, OTHER, INK, FAINT, RULE = "#0b6e6e", "#c2571a", "#22262e", "#7a8190", "#e6e8ec"
#: Name and contents.
File = tuple[str, bytes]
#: Bars in one figure; of more classes the most frequent are drawn.
BARS = 40


def style(figure: Figure, axes: Axes, title: str) -> None:
    """A title on the left, no frame and no ticks."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, color=INK, fontweight="bold")
    axes.tick_params(length=0, labelsize=8, labelcolor=INK)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)


def files(name: str, figure: Figure) -> list[File]:
    """The figure as NAME.svg and NAME.png."""
    written = []
    for kind in ("svg", "png"):
        out = io.BytesIO()
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(out, format=kind, dpi=160, facecolor="white", metadata=metadata)
        written.append((f"{name}.{kind}", out.getvalue()))
    return written


def _curve(axes: Axes, found: Direction, color: str, label: str) -> None:
    ks = range(1, min(100, found.candidates) + 1)
    axes.plot(ks, [100 * found.recall(k) for k in ks], color=color, lw=2, label=label)
    axes.plot(ks, [100 * found.chance(k) for k in ks], color=color, lw=1, ls=":", label=f"{label}, chance")


def retrieval_plot(found: Retrieval) -> list[File]:
    """Recall over k, both directions."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    _curve(axes, found.text_to_image, OURS, "text to image")
    _curve(axes, found.image_to_text, OTHER, "image to text")
    style(figure, axes, f"Recall@k of {found.pictures} pictures and {found.texts} texts")
    axes.set_xscale("log")
    ticks = [k for k in (1, 2, 5, 10, 20, 50, 100) if k <= max(found.pictures, found.texts)]
    axes.set_xticks(ticks, list(map(str, ticks)))
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("k", fontsize=9, color=FAINT)
    axes.set_ylabel("%", fontsize=9, color=FAINT, rotation=0)
    axes.grid(color=RULE, lw=0.6)
    axes.legend(frameon=False, fontsize=8)
    return files("retrieval", figure)


def _bars(
    name: str, title: str, labels: Sequence[str], values: Sequence[float], chance: Sequence[float], mean: float
) -> list[File]:
    """Horizontal bars in percent, a tick at chance for each, a line at that of all."""
    figure = Figure(figsize=(6.4, 0.2 * len(labels) + 1.1), layout="constrained")
    axes = figure.subplots()
    places = range(len(labels))
    axes.barh(places, [100 * v for v in values], 0.7, color=OURS)
    axes.plot([100 * c for c in chance], places, "|", color=OTHER, ms=7, mew=1.5, label="chance")
    axes.axvline(100 * mean, color=FAINT, lw=1, ls="--", label=f"all {100 * mean:.1f} %")
    most = max([*values, *chance, mean, 0.01])
    for place, value in zip(places, values, strict=True):
        at = axes.get_yaxis_transform()
        axes.text(1.01, place, f"{100 * value:.1f}", transform=at, va="center", fontsize=6.5, color=INK)
    style(figure, axes, title)
    axes.set_yticks(places, labels, fontsize=7.5)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlim(0, 102 * most)
    axes.set_xlabel("%", fontsize=9, color=FAINT)
    axes.grid(axis="x", color=RULE, lw=0.6)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return files(name, figure)


def _largest(results: dict[str, dict[str, Any]]) -> str:
    """The largest k that all languages have."""
    shared = set.intersection(*(set(r["text_to_image"]["recall"]) for r in results.values()))
    return max(shared, key=int)


def language_plot(results: dict[str, dict[str, Any]]) -> list[File]:
    """Text-to-image recall at the largest k, best language first."""
    k = _largest(results)
    best_first = sorted(results.items(), key=lambda item: -item[1]["text_to_image"]["recall"][k])
    names = [name for name, _ in best_first]
    values, chance = ([r["text_to_image"][kind][k] for _, r in best_first] for kind in ("recall", "chance"))
    title = f"Text-to-image recall@{k} by language"
    return _bars("languages", title, names, values, chance, sum(values) / len(values))


def zero_shot_plot(result: dict[str, Any]) -> list[File]:
    """Top-1 accuracy of the most frequent classes, best first."""
    order = sorted(result["by_class"].items(), key=lambda item: -item[1]["pictures"])[:BARS]
    order.sort(key=lambda item: -item[1]["top1"])
    names = [name if len(name) <= 40 else name[:39] + "…" for name, _ in order]
    values = [entry["top1"] for _, entry in order]
    of = f" (the {BARS} largest of {len(result['by_class'])})" if len(result["by_class"]) > BARS else ""
    title = f"Zero-shot top-1 accuracy by class{of}"
    return _bars("zero_shot", title, names, values, [result["chance1"]] * len(names), result["top1"])


#: Part of a results.json -> how it is drawn.
DRAW: dict[str, Callable[[Any], list[File]]] = {
    "retrieval": retrieval_plot,
    "languages": language_plot,
    "zero_shot": zero_shot_plot,
}

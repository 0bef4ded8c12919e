"""demo/report.html: one self-contained page; pictures are data URIs, charts are inline SVG."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import torch

from vlkern import data
from vlkern.demo.chart import Axis, Bar, Line, bars, draw
from vlkern.demo.opbench import WIDTH, Point
from vlkern.demo.packing import BATCH, MODEL, ROUNDS, Packing
from vlkern.demo.training import History
from vlkern.evaluation.retrieval import Retrieval
from vlkern.search.hits import Hit
from vlkern.search.page import Card, answer, document, facts, thumbnail


@dataclass(frozen=True)
class Story:
    """Everything that the page tells."""

    facts: dict[str, str]
    history: History
    retrieval: Retrieval
    pairs: data.Pairs
    queries: Sequence[str]
    answers: Sequence[Sequence[Hit]]
    points: Sequence[Point]
    explanation: str
    packing: Packing
    dtype: torch.dtype


def smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, unbiased at the start."""
    out, total, norm = [], 0.0, 0.0
    for value in values:
        total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        out.append(total / norm)
    return out


def _loss_chart(history: History) -> str:
    steps = list(range(1, len(history.losses) + 1))
    lines = [Line("", "faint", steps, history.losses), Line("", "ours", steps, smooth(history.losses))]
    return draw(lines, Axis("step"), Axis("loss"))


def _bytes(value: float) -> str:
    """Such as 1.5 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} GiB"


def _op_chart(points: Sequence[Point], title: str, values: dict[str, list[float]]) -> str:
    batches = [p.batch for p in points]
    kinds = {"eager": "rival", "fused": "ours"}
    lines = [
        Line(f"{name} PyTorch" if name == "eager" else "vlkern", kinds[name], batches, values[name], True)
        for name in kinds
    ]
    return draw(lines, Axis("batch size B", True, "{:.0f}".format), Axis(title, True), x_ticks=batches)


def _op_charts(points: Sequence[Point]) -> tuple[str, str]:
    time = {name: [p.milliseconds[name] for p in points] for name in ("fused", "eager")}
    # A logarithmic axis has no zero: less than a page of extra memory is drawn as one page.
    memory = {name: [max(p.extra_bytes[name], 4096) / 2**20 for p in points] for name in ("fused", "eager")}
    return _op_chart(points, "milliseconds", time), _op_chart(points, "extra memory, MiB", memory)


def _op_table(points: Sequence[Point]) -> str:
    rows = []
    for p in points:
        ours, eager = p.milliseconds["fused"], p.milliseconds["eager"]
        rows.append(
            f"<tr><th>{p.batch}</th><td>{ours:.1f} ms</td><td>{eager:.1f} ms</td><td>{p.speedup:.1f}x</td>"
            f"<td>{_bytes(p.extra_bytes['fused'])}</td><td>{_bytes(p.extra_bytes['eager'])}</td></tr>"
        )
    head = "<th>B</th><th>vlkern</th><th>eager</th><th>faster</th><th>vlkern, extra</th><th>eager, extra</th>"
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _packing(p: Packing, dtype: str) -> str:
    used = f"{p.tokens} patches"
    tokens = [
        Bar("padded", "rival", p.slots, f"{used} and {p.slots - p.tokens} pads ({100 * p.wasted:.0f} %)", p.tokens),
        Bar("packed", "ours", p.tokens, f"{used}, no pads"),
    ]
    rates = [
        Bar(form, kind, p.rate(form), f"{p.rate(form):.0f} a second")
        for form, kind in (("padded", "rival"), ("packed", "ours"))
    ]
    return f"""<section><h2>Packed instead of padded</h2>
<p>Pictures of different shapes have different numbers of patches: a padded batch computes as many tokens for each as
for its largest picture, a packed one lays them end to end, and <code>vlkern.ops.interval_attention</code> keeps them
apart.</p>
<p>{p.pictures} held-out pictures at their own size and aspect ratio, {BATCH} at once, through the image tower of
<code>{MODEL}</code> in {dtype} with random weights, which change neither tokens nor time. Both forms run the same
layers and the same attention and give the same tokens, which is checked first; they alternate in one process (median of
{ROUNDS}). Packed is {p.speedup:.2f}x as fast. Where every picture is first enlarged to about the same number of
patches, as SigLIP 2's processor does, few pads are left to save.</p>
<div class="charts">{bars("tokens computed", tokens)}{bars("pictures encoded per second", rates)}</div></section>"""


def _recall_table(r: Retrieval) -> str:
    rows = []
    for k in (1, 5, 10):
        chance = r.text_to_image.chance(k)
        cells = "".join(
            f'<td>{100 * value:.1f} %<span class="note"> {value / chance:.1f}x chance</span></td>'
            for value in (r.text_to_image.recall(k), r.image_to_text.recall(k))
        )
        rows.append(f"<tr><th>recall@{k}</th>{cells}<td>{100 * chance:.2f} %</td></tr>")
    head = "<th></th><th>text to image</th><th>image to text</th><th>chance</th>"
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _answer(pairs: data.Pairs, query: str, hits: Sequence[Hit]) -> str:
    cards = (Card(thumbnail(pairs.files[h.picture]), pairs.captions[h.picture][0], f"{h.cosine:.2f}") for h in hits)
    return answer(query, cards)


def page(story: Story) -> str:
    """The whole page as text."""
    time_chart, memory_chart = _op_charts(story.points)
    r, dtype = story.retrieval, str(story.dtype).removeprefix("torch.")
    answers = "".join(_answer(story.pairs, q, a) for q, a in zip(story.queries, story.answers, strict=True))
    header = """<h1>A small SigLIP, trained here</h1>
<p>Two small transformers, one for pictures and one for text, learned from scratch on this machine which caption belongs
to which drawing. The loss is <code>vlkern.ops.sigmoid_contrastive_loss</code>.</p>"""
    body = f"""{facts(story.facts)}
<section><h2>Searches</h2>
<p>The closest of {r.pictures} drawings that were not in the training set, best first, with their own captions and the
cosine between query and picture. The model never sees those captions.</p>{answers}</section>
<section><h2>Retrieval</h2>
<p>Each of the {r.pictures} held-out pictures is asked for by its first caption, and the other way round. Only the very
picture counts as found, even where several would fit the words.</p>{_recall_table(r)}</section>
<section><h2>Loss</h2><p>Each step, and its moving average.</p>
<div class="charts one">{_loss_chart(story.history)}</div></section>
<section><h2>The loss by itself</h2>
<p>Forward and backward on random unit vectors, {dtype}, width {WIDTH}: the fused op beside the same formula in eager
PyTorch, alternating in one process (median of five). Extra memory is the peak beyond inputs, results and
gradients, in a fresh process: eager PyTorch keeps several B x B tensors, the fused op none.</p>
<div class="charts">{time_chart}{memory_chart}</div>{_op_table(story.points)}
<pre>{escape(story.explanation)}</pre></section>
{_packing(story.packing, dtype)}"""
    return document("vlkern demo", header, body)

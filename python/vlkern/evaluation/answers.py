"""How well a PaliGemma answers: classes, boxes, and the tokens of captions, each beside what needs no picture.

category  share of pictures whose class is named; chance: always the most frequent class
boxes     share of the pictures on canvases for which there is a box with IoU >= 0.5; chance: the boxes that the
          model gives for the next canvas
caption   share of a caption's tokens that are the most likely ones after those before; chance: always the most
          frequent token
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from vlkern import data
from vlkern.boxes import Box, Detection, parse
from vlkern.data.tasks import PREFIXES, Example, Tasks
from vlkern.generation import generate

Show = Callable[[int], None]
#: Tokens of the longest answer that is waited for.
_LONGEST = {"category": 12, "detect": 64}


def iou(a: Box, b: Box) -> float:
    """Area that two boxes share, of the area that they cover together.

    Example:
        >>> iou((0.0, 0.0, 0.5, 1.0), (0.0, 0.0, 1.0, 0.5))
        0.3333333333333333
    """

    def area(top: float, left: float, bottom: float, right: float) -> float:
        return max(bottom - top, 0) * max(right - left, 0)

    both = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    either = area(*a) + area(*b) - both
    return both / either if either else 0.0


def found(truth: Sequence[Detection], answer: Sequence[Detection]) -> list[Detection | None]:
    """For each true object the answer's with an IoU of at least a half, the best ones first, each at most once."""
    pairs = sorted(
        ((iou(t.box, a.box), i, j) for i, t in enumerate(truth) for j, a in enumerate(answer)), key=lambda p: -p[0]
    )
    taken: dict[int, int] = {}
    for value, i, j in pairs:
        if value >= 0.5 and i not in taken and j not in taken.values():
            taken[i] = j
    return [answer[taken[i]] if i in taken else None for i in range(len(truth))]


class Questions:
    """Puts the questions of `tasks` to a model, many pictures at once.

    Args:
        model: a PaliGemma.
        vocabulary: of its tokenizer.
        tasks: the examples; number i is made of pair i.
        batch: pictures at once.
    """

    def __init__(self, model: Any, vocabulary: data.Vocabulary, tasks: Tasks, batch: int) -> None:
        self._model, self._vocabulary, self._tasks, self._batch = model, vocabulary, tasks, batch
        self._layout = data.Layout(vocabulary, model.config.image_token, model.config.image_tokens)
        self._device = next(model.parameters()).device
        self.skipped: dict[int, str] = {}

    def examples(self, kind: str, numbers: Sequence[int]) -> list[tuple[int, Example]]:
        """Those that can be read."""
        self._tasks.kinds = [kind]
        made = [(number, self._tasks(number, draw=number)) for number in numbers]
        for _, example in made:
            self.skipped |= example.lines
        return [(number, example) for number, example in made if example.pixels is not None and not example.lines]

    def answers(self, kind: str, examples: Sequence[Example]) -> list[str]:
        """What the model says."""
        ids = tuple(self._layout.prefix(PREFIXES[kind]))
        pixels = [data.to_unit(example.pixels)[None] for example in examples if example.pixels is not None]
        prompts = [data.Prompt(ids, picture, len(ids)) for picture in pixels]
        said = generate(self._model, prompts, tokenizer=self._vocabulary, max_new_tokens=_LONGEST[kind])
        return [completion.text.strip() for completion in said]

    def each(self, kind: str, numbers: Sequence[int], show: Show) -> list[tuple[int, Example, str]]:
        """Number, example and answer of all that can be read."""
        results = []
        for first in range(0, len(numbers), self._batch):
            part = self.examples(kind, numbers[first : first + self._batch])
            if part:
                said = self.answers(kind, [example for _, example in part])
                results += [(number, example, text) for (number, example), text in zip(part, said, strict=True)]
            show(first + len(part))
        return results

    def category(self, numbers: Sequence[int], show: Show = lambda done: None) -> dict[str, Any]:
        """Accuracy over pictures and classes; pictures without a class are left out."""
        labelled = [number for number in numbers if self._tasks.category(number)]
        results = self.each("category", labelled, show)
        total, right = Counter[str](), Counter[str]()
        for _, example, text in results:
            total[example.suffix] += 1
            right[example.suffix] += text.lower() == example.suffix.lower()
        by_class = {name: {"pictures": total[name], "accuracy": right[name] / total[name]} for name in sorted(total)}
        return {
            "pictures": len(results),
            "classes": len(total),
            "accuracy": sum(right.values()) / max(len(results), 1),
            "chance": max(total.values(), default=0) / max(len(results), 1),
            "mean_over_classes": sum(entry["accuracy"] for entry in by_class.values()) / max(len(by_class), 1),
            "by_class": by_class,
        }

    def boxes(self, numbers: Sequence[int], show: Show = lambda done: None) -> dict[str, Any]:
        """Recall of boxes, with and without the right class."""
        results = self.each("detect", numbers, show)
        truth = [example.objects for _, example, _ in results]
        said = [parse(text).objects for _, _, text in results]
        count = max(sum(map(len, truth)), 1)
        hits = [found(objects, answer) for objects, answer in zip(truth, said, strict=True)]
        other = [found(objects, answer) for objects, answer in zip(truth, [*truth[1:], *truth[:1]], strict=True)]
        named = sum(
            hit is not None and hit.label.lower() == true.label.lower()
            for objects, row in zip(truth, hits, strict=True)
            for true, hit in zip(objects, row, strict=True)
        )
        return {
            "canvases": len(results),
            "objects": sum(map(len, truth)),
            "answered": sum(map(len, said)),
            "found": sum(hit is not None for row in hits for hit in row) / count,
            "named": named / count,
            "chance": sum(hit is not None for row in other for hit in row) / count,
        }

    @torch.inference_mode()
    def caption(self, numbers: Sequence[int], show: Show = lambda done: None) -> dict[str, Any]:
        """Accuracy of the next token, with the right ones before it."""
        counts, right, total = Counter[int](), 0, 0
        for first in range(0, len(numbers), self._batch):
            part = [example for _, example in self.examples("caption", numbers[first : first + self._batch])]
            if part:
                pictures = [example.pixels for example in part if example.pixels is not None]
                batch = data.pack_examples(pictures, [(e.prefix, e.suffix) for e in part], self._layout)
                pixels, ids, cu_seqlens, until, places, targets, _ = (x.to(self._device) for x in batch)
                embedded = self._model.embed(ids, data.to_unit(pixels))
                hidden = self._model.hidden(embedded, cu_seqlens, until=until)[places]
                right += int((self._model.logits(hidden).argmax(-1) == targets).sum())
                total += len(targets)
                counts.update(targets.tolist())
            show(first + len(part))
        return {
            "tokens": total,
            "accuracy": right / max(total, 1),
            "chance": max(counts.values(), default=0) / max(total, 1),
        }

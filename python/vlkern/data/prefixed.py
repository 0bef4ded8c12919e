"""Packed sequences for a prefix-LM: [image tokens] start question separator | answer end.

Every token up to the separator sees all of these; what follows sees what came before. Only the answer and its end are
to be predicted.

    b examples of this rank   T tokens of all of them   M tokens to be predicted
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from vlkern.data.batches import Steps, check_batches
from vlkern.data.tasks import Example, Tasks
from vlkern.data.vocabulary import Vocabulary

#: The most tokens of an answer and its end.
LONGEST = 64


@dataclass(frozen=True)
class Layout:
    """How a model's sequences are built.

    vocabulary   of the text
    image_token  the id that stands for a part of the picture
    image_count  how many of them a picture has
    """

    vocabulary: Vocabulary
    image_token: int
    image_count: int

    def prefix(self, question: str) -> list[int]:
        """Image tokens, start, question and separator. The separator is encoded by itself, so it never merges."""
        words = self.vocabulary
        start = [] if words.start is None else [words.start]
        return [self.image_token] * self.image_count + start + words.encode(question) + words.encode("\n")

    def suffix(self, answer: str) -> list[int]:
        """At most `LONGEST` tokens, the last of which is the end."""
        return [*self.vocabulary.encode(answer)[: LONGEST - 1], self.vocabulary.end]


class Packed(NamedTuple):
    """b examples, packed.

    pixels      [b, 3, H, W] uint8
    ids         [T] int64; the end of an answer, which predicts nothing, is not among them
    cu_seqlens  [b + 1] int32
    until       [T] int32, the last position in its sequence that each token sees
    places      [M] int64: tokens whose successor is to be predicted
    targets     [M] int64: these successors
    weights     [M] float32: 1 / (b * tokens of the answer), so that every example counts the same
    """

    pixels: torch.Tensor
    ids: torch.Tensor
    cu_seqlens: torch.Tensor
    until: torch.Tensor
    places: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor


def pack_examples(pixels: Sequence[torch.Tensor], texts: Sequence[tuple[str, str]], layout: Layout) -> Packed:
    """Pictures [3, H, W] uint8 of one size, and a question and an answer for each.

    Example:
        >>> import torch
        >>> layout = Layout(load_vocabulary("bytes"), image_token=1283, image_count=2)
        >>> batch = pack_examples([torch.zeros(3, 8, 8, dtype=torch.uint8)], [("a", "b")], layout)
        >>> batch.ids.tolist(), batch.until.tolist(), batch.targets.tolist()
        ([1283, 1283, 2, 35, 100, 13, 35, 101], [5, 5, 5, 5, 5, 5, 6, 7], [35, 101, 1])
    """
    ids: list[int] = []
    until: list[int] = []
    places: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    firsts = [0]
    for question, answer in texts:
        prefix, suffix = layout.prefix(question), layout.suffix(answer)
        first, last = firsts[-1], len(prefix) - 1
        ids += prefix + suffix[:-1]
        until += [last] * len(prefix) + list(range(last + 1, last + len(suffix)))
        places += range(first + last, first + last + len(suffix))
        targets += suffix
        weights += [1 / (len(texts) * len(suffix))] * len(suffix)
        firsts.append(len(ids))
    return Packed(
        torch.stack(list(pixels)),
        torch.tensor(ids),
        torch.tensor(firsts, dtype=torch.int32),
        torch.tensor(until, dtype=torch.int32),
        torch.tensor(places),
        torch.tensor(targets),
        torch.tensor(weights, dtype=torch.float32),
    )


class _Items(Dataset[Example]):
    def __init__(self, tasks: Tasks) -> None:
        self.tasks = tasks

    def __getitem__(self, where: tuple[int, int]) -> Example:
        return self.tasks(*where)


class _Collate:
    """Tokenizes and packs in the worker. Nothing comes of a batch with a hole; its lines say why."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def __call__(self, examples: Sequence[Example]) -> tuple[Packed | None, dict[int, str]]:
        bad = {index: line for example in examples for index, line in example.lines.items()}
        pixels = [example.pixels for example in examples if example.pixels is not None]
        if len(pixels) < len(examples):
            return None, bad
        return pack_examples(pixels, [(example.prefix, example.suffix) for example in examples], self.layout), bad


def prefixed_batches(
    tasks: Tasks,
    global_batch: int,
    *,
    layout: Layout,
    seed: int = 0,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
) -> Iterator[Packed]:
    """An endless stream of batches, the part of one rank; order, arguments and errors as `vlkern.data.batches`.

    Example:
        >>> tasks = Tasks(PairShards(clipart_mini() / "test.tar", 32), 32)
        >>> layout = Layout(load_vocabulary("bytes"), image_token=1283, image_count=16)
        >>> batch = next(prefixed_batches(tasks, 8, layout=layout, start=100))
        >>> batch.pixels.shape, len(batch.cu_seqlens)
        (torch.Size([8, 3, 32, 32]), 9)
    """
    pairs = tasks.pairs
    check_batches(pairs, global_batch, start, rank, world, workers)
    loader = DataLoader(
        _Items(tasks),
        batch_sampler=Steps(len(pairs), global_batch, seed, start, rank, world),
        num_workers=workers,
        collate_fn=_Collate(layout),
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # or the loader would draw from the global one
    )
    return _checked(tasks, loader)


def _checked(tasks: Tasks, loader: DataLoader[Example]) -> Iterator[Packed]:
    """Reports what the workers could not read; `note` raises where nothing came."""
    for batch, bad in loader:
        if bad:
            tasks.pairs.note(bad)
        yield batch

"""The three evaluations on embedded pictures: retrieval, retrieval in each language, zero-shot classification."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlkern.evaluation.encoder import Encoder
from vlkern.evaluation.retrieval import Direction, Retrieval, retrieval
from vlkern.evaluation.zeroshot import Classification, class_embeddings, classify, numbered, prompts

Show = Callable[[int], None]


def _silent(done: int) -> None:
    pass


def strings_at(record: Any, key: str) -> tuple[str, ...]:
    """The string or strings that a JSON record has at `key`, whose steps are separated by dots; () if there are none.

    Example:
        >>> strings_at({"names": {"de": "Hund"}}, "names.de")
        ('Hund',)
    """
    for step in key.split("."):
        record = record.get(step) if isinstance(record, dict) else None
    found = record if isinstance(record, list) else [record]
    return tuple(text for text in found if isinstance(text, str) and text.strip())


def find_languages(records: Sequence[Mapping[str, Any]], key: str) -> dict[str, list[tuple[str, ...]]]:
    """Language -> the names of each picture in it, () where there are none; languages in alphabetical order."""
    found: dict[str, None] = {}
    for record in records:
        names: Any = record
        for step in key.split("."):
            names = names.get(step) if isinstance(names, dict) else None
        if isinstance(names, dict):
            found.update(dict.fromkeys(names))
    return {language: [strings_at(r, f"{key}.{language}") for r in records] for language in sorted(found)}


def retrieve(
    encoder: Encoder, vectors: torch.Tensor, captions: Sequence[Sequence[str]], *, show: Show = _silent
) -> Retrieval:
    """All captions of all pictures against each other.

    Args:
        encoder: embeds the captions.
        vectors: [N, E], the pictures.
        captions: of each picture; pictures without one are left out.
        show: called with the number of captions done.

    Raises:
        ValueError: no picture has a caption.
    """
    kept = [i for i, texts in enumerate(captions) if texts]
    owner = torch.tensor([n for n, i in enumerate(kept) for _ in captions[i]], dtype=torch.int64)
    texts = encoder.texts([text for i in kept for text in captions[i]], show=show)
    device = encoder.device
    return retrieval(vectors[kept].to(device), texts.to(device), owner.to(device))


@dataclass(frozen=True, eq=False)
class ZeroShot:
    """The outcome and what it was asked with."""

    outcome: Classification
    templates: Sequence[str]


def zero_shot(
    encoder: Encoder,
    vectors: torch.Tensor,
    labels: Sequence[Sequence[str]],
    classes: Mapping[str, Sequence[str]],
    templates: Sequence[str],
    *,
    most: int = 5,
    show: Show = _silent,
) -> ZeroShot:
    """Name the class of every picture.

    Args:
        encoder: embeds the classes' sentences.
        vectors: [N, E], the pictures.
        labels: keys of the right classes of each picture.
        classes: key -> names.
        templates: sentences with `{}` for a name.
        most: how many classes are kept for each picture.
        show: called with the number of sentences done.

    Raises:
        UserError: a picture's class is not among `classes`.
    """
    right = numbered(labels, classes)
    sentences = [(i, s) for i, names in enumerate(classes.values()) for name in names for s in prompts(name, templates)]
    texts = encoder.texts([sentence for _, sentence in sentences], show=show)
    centres = class_embeddings(texts, torch.tensor([i for i, _ in sentences]), len(classes))
    return ZeroShot(Classification(list(classes), right, classify(vectors, centres, most)), templates)


def _direction(found: Direction, ks: Sequence[int]) -> dict[str, dict[str, float]]:
    """As JSON."""
    fit = [k for k in ks if k <= found.candidates]
    return {name: {str(k): get(k) for k in fit} for name, get in (("recall", found.recall), ("chance", found.chance))}


def retrieval_json(found: Retrieval, ks: Sequence[int]) -> dict[str, Any]:
    """Recall@k and chance of both directions; a k above the number of candidates is left out."""
    return {
        "pictures": found.pictures,
        "texts": found.texts,
        "text_to_image": _direction(found.text_to_image, ks),
        "image_to_text": _direction(found.image_to_text, ks),
    }


def zero_shot_json(found: ZeroShot) -> dict[str, Any]:
    """Accuracies over pictures and over classes, and a table of classes."""
    outcome = found.outcome
    ks = [k for k in (1, 5) if k <= outcome.top.shape[1]]
    tables = {k: outcome.by_class(k) for k in ks}
    classes: dict[str, dict[str, Any]] = {}
    for label, (pictures, _) in tables[1].items():
        taken = outcome.taken_for(label)
        classes[outcome.names[label]] = {
            "pictures": pictures,
            **{f"top{k}": tables[k][label][1] for k in ks},
            "taken_for": None if taken is None else outcome.names[taken],
        }
    return {
        "pictures": len(outcome.labels),
        "classes": len(outcome.names),
        "templates": list(found.templates),
        **{f"top{k}": outcome.accuracy(k) for k in ks},
        **{f"chance{k}": outcome.chance(k) for k in ks},
        "mean_over_classes": sum(entry["top1"] for entry in classes.values()) / len(classes),
        "by_class": classes,
    }

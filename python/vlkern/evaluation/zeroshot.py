"""Zero-shot classification: a class is the mean embedding of sentences that name it.

    c = m / (|m| + 1e-8),   m = mean over names and templates of y_text,   prediction = arg max <x_image, c>

Source: Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021; big_vision.
"""

import json
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vlkern.errors import UserError

#: Sets of templates by name. `clip_best` is CLIP's choice for ImageNet, and the bare name, as in big_vision.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "name": ("{}",),
    "photo": ("{}", "a photo of a {}", "a photo of the {}"),
    "clip_best": (
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
        "{}",
    ),
}


def canonical(text: str, keep: str = "") -> str:
    """Lower-case, `_` as a blank, without ASCII punctuation, runs of blanks as one: big_vision's form of a prompt.

    Args:
        text: any text.
        keep: a string that stays as it is, though it is punctuation.

    Example:
        >>> canonical("A  Photo_of: the {}!", keep="{}")
        'a photo of the {}'
    """
    drop = str.maketrans("", "", string.punctuation)
    parts = text.replace("_", " ").split(keep) if keep else [text.replace("_", " ")]
    return re.sub(r"\s+", " ", keep.join(part.translate(drop) for part in parts).lower()).strip()


def prompts(name: str, templates: Sequence[str]) -> list[str]:
    """The sentences of one name, one for each template; a name keeps its commas ("tench, Tinca tinca").

    Example:
        >>> prompts("Traffic_Light", ["A photo of a {}."])
        ['a photo of a traffic light']
    """
    name = canonical(name, keep=",")
    return [canonical(template, keep="{}").replace("{}", name) for template in templates]


def load_templates(source: str) -> tuple[str, ...]:
    """A set of TEMPLATES by name, or a file with one template a line; `{}` is where the name goes.

    Raises:
        UserError: neither, or a line does not hold `{}` exactly once.
    """
    if source in TEMPLATES:
        return TEMPLATES[source]
    try:
        lines = Path(source).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"--templates {source}: expected {', '.join(TEMPLATES)} or a readable text file ({reason})"
        ) from error
    for number, line in enumerate(lines, 1):
        if line.strip() and line.count("{}") != 1:
            raise UserError(f"{source}:{number}: a template holds {{}} exactly once, got {line.strip()!r}")
    templates = tuple(line.strip() for line in lines if line.strip())
    if not templates:
        raise UserError(f"--templates {source}: no template there, one a line is expected")
    return templates


def load_classes(path: str | Path) -> dict[str, tuple[str, ...]]:
    """Classes from JSON: an object of key -> name or list of names, or a list of names, which are then their own keys.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--classes {path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"--classes {path}: no valid JSON ({error})") from error
    if isinstance(found, list) and all(isinstance(name, str) for name in found):
        if len(set(found)) < len(found):
            raise UserError(f"--classes {path}: {max(found, key=found.count)!r} is there twice")
        found = {name: name for name in found}
    if not isinstance(found, dict) or not found:
        raise UserError(f"--classes {path}: expected an object of key -> name, or a list of names")
    classes = {key: (names,) if isinstance(names, str) else names for key, names in found.items()}
    for key, names in classes.items():
        fit = isinstance(names, list | tuple) and names and all(isinstance(n, str) and canonical(n, ",") for n in names)
        if not fit:
            raise UserError(f"--classes {path}: class {key!r} needs a name or a list of names, got {names!r}")
    return {key: tuple(names) for key, names in classes.items()}


def class_embeddings(text: torch.Tensor, label: torch.Tensor, classes: int) -> torch.Tensor:
    """The classes' embeddings from those of their sentences.

    Args:
        text: [T, E] of length 1.
        label: [T] int64, the class of each sentence; every class has at least one.
        classes: how many there are, C.

    Returns:
        [C, E]: mean of the sentences, divided by its length + 1e-8.

    Raises:
        ValueError: a class without sentence, or a label that is no class.

    Example:
        >>> class_embeddings(torch.eye(2), torch.tensor([0, 0]), 1)
        tensor([[0.7071, 0.7071]])
    """
    if label.shape != text.shape[:1] or not torch.equal(label.unique().cpu(), torch.arange(classes)):
        raise ValueError(f"label must give each of the {classes} classes at least one of the {len(text)} sentences")
    mean = text.new_zeros(classes, text.shape[1]).index_add_(0, label, text)
    mean = mean / torch.bincount(label, minlength=classes)[:, None]
    return mean / (mean.norm(dim=1, keepdim=True) + 1e-8)


@dataclass(frozen=True, eq=False)
class Classification:
    """Pictures with their classes and the model's answers.

    names   the classes' keys
    labels  the right classes of each picture, at least one; any of them counts
    top     [N, K] the K most similar classes of each picture, best first
    """

    names: Sequence[str]
    labels: Sequence[frozenset[int]]
    top: torch.Tensor

    def hits(self, k: int) -> torch.Tensor:
        """[N] bool: is a right class among the first k? Raises ValueError unless 1 <= k <= K."""
        if not 1 <= k <= self.top.shape[1]:
            raise ValueError(f"k must be 1 to {self.top.shape[1]}, got {k}")
        rows = zip(self.top[:, :k].tolist(), self.labels, strict=True)
        return torch.tensor([not right.isdisjoint(row) for row, right in rows], dtype=torch.bool)

    def accuracy(self, k: int) -> float:
        """The fraction of pictures with a right class among the first k."""
        return self.hits(k).double().mean().item()

    def chance(self, k: int) -> float:
        """Accuracy of a random order, for pictures of one class: k / C."""
        return k / len(self.names)

    def by_class(self, k: int) -> dict[int, tuple[int, float]]:
        """Class -> (how many pictures have it, accuracy among them); classes without pictures are left out."""
        hit = self.hits(k).tolist()
        members: dict[int, list[bool]] = {}
        for right, good in zip(self.labels, hit, strict=True):
            for label in right:
                members.setdefault(label, []).append(good)
        return {label: (len(goods), sum(goods) / len(goods)) for label, goods in sorted(members.items())}

    def taken_for(self, label: int) -> int | None:
        """The class that wrong answers for pictures of class `label` name most often; None if none is wrong."""
        answers = zip(self.top[:, 0].tolist(), self.labels, strict=True)
        wrong = [answer for answer, right in answers if label in right and answer not in right]
        return max(sorted(set(wrong)), key=wrong.count) if wrong else None


@torch.no_grad()
def classify(image: torch.Tensor, classes: torch.Tensor, k: int = 5, *, block: int = 4096) -> torch.Tensor:
    """[N, E] and [C, E] -> [N, min(k, C)] int64, the most similar classes of each picture, best first."""
    k = min(k, len(classes))
    return torch.cat([(part @ classes.T).topk(k).indices for part in image.split(block)]).cpu()


def numbered(labels: Sequence[Sequence[str]], classes: Mapping[str, object]) -> list[frozenset[int]]:
    """Keys of classes as their numbers.

    Raises:
        UserError: a picture has a class that is not in `classes`; names some of them.
    """
    number = {key: i for i, key in enumerate(classes)}
    unknown = {key: None for keys in labels for key in keys if key not in number}
    if unknown:
        shown = ", ".join(map(repr, list(unknown)[:3])) + (", ..." if len(unknown) > 3 else "")
        raise UserError(
            f"--classes: pictures have {len(unknown)} classes that are not among the {len(number)} there: {shown}"
        )
    return [frozenset(number[key] for key in keys) for keys in labels]

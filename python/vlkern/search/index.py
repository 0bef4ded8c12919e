"""Embeddings of pictures in one safetensors file, reused for those that have not changed since."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from vlkern._files import write_file
from vlkern.errors import UserError
from vlkern.evaluation.encoder import Encoder
from vlkern.evaluation.pictures import Pictures, Stamp, require_some

_FORMAT = "vlkern search index 1"


@dataclass(frozen=True, eq=False)
class Index:
    """Pictures and their embeddings.

    model    fingerprint of the encoder
    names    of the N pictures
    stamps   [N, 2] int64, time of the last change and size of each picture's file
    vectors  [N, E] float32, of length 1
    """

    model: str
    names: list[str]
    stamps: torch.Tensor
    vectors: torch.Tensor

    def __len__(self) -> int:
        return len(self.names)


def load_index(path: str | Path) -> Index:
    """Read what `save_index` wrote.

    Raises:
        UserError: there is something else, or nothing.
    """
    import safetensors

    advice = "choose another name, or delete it"
    try:
        with safetensors.safe_open(str(path), "pt") as file:
            about = file.metadata() or {}
            if about.get("format") != _FORMAT:
                raise UserError(f"--index {path}: is not an index of `vlkern search` ({advice})")
            names, stamps, vectors = (file.get_tensor(name) for name in ("names", "stamps", "vectors"))
    except OSError as error:
        raise UserError(f"--index {path}: cannot be read ({error.strerror or error})") from error
    except safetensors.SafetensorError as error:
        raise UserError(f"--index {path}: is not an index of `vlkern search` ({advice}; {error})") from error
    parts = [os.fsdecode(name) for name in bytes(names.tolist()).split(b"\0")[:-1]]
    if not len(parts) == len(stamps) == len(vectors):
        raise UserError(f"--index {path}: is damaged ({advice})")
    return Index(about["model"], parts, stamps, vectors)


def save_index(index: Index, path: str | Path) -> None:
    """Write it, all or nothing.

    Raises:
        UserError: the file cannot be written.
    """
    import safetensors.torch

    names = b"".join(os.fsencode(name) + b"\0" for name in index.names)
    tensors = {
        "names": torch.frombuffer(bytearray(names), dtype=torch.uint8) if names else torch.empty(0, dtype=torch.uint8),
        "stamps": index.stamps,
        "vectors": index.vectors,
    }
    about = {"format": _FORMAT, "model": index.model}
    write_file(Path(path), safetensors.torch.save(tensors, about))


def build(
    encoder: Encoder,
    pictures: Pictures,
    old: Index | None = None,
    *,
    show: Callable[[int], None] = lambda done: None,
) -> tuple[Index, torch.Tensor, list[str], int]:
    """Embed pictures, except those that `old` holds with the same name, time of change and size, from the same model.

    Args:
        encoder: embeds the pictures.
        pictures: all that the index shall hold.
        old: an earlier index.
        show: called with the number of pictures done.

    Returns:
        The index, the number of each of its pictures in `pictures`, a line for each that could not be read, and how
        many were taken from `old`.

    Raises:
        UserError: not one picture can be read.
    """
    model = encoder.fingerprint()
    names = [pictures.name(i) for i in range(len(pictures))]
    stamps = [pictures.stamp(i) for i in range(len(pictures))]
    known: dict[tuple[str, Stamp], int] = {}
    if old is not None and old.model == model:
        known = {
            (name, Stamp(*stamp)): i for i, (name, stamp) in enumerate(zip(old.names, old.stamps.tolist(), strict=True))
        }
    reused = {i: known[key] for i, key in enumerate(zip(names, stamps, strict=True)) if key in known}
    missing = [i for i in range(len(pictures)) if i not in reused]
    fresh = encoder.pictures(pictures, missing, show=show) if missing else None
    kept = sorted([*reused, *(fresh.kept.tolist() if fresh else [])])
    skipped = fresh.skipped if fresh else []
    require_some(pictures, len(kept), skipped)
    vectors = torch.zeros(len(pictures), encoder.width)
    if reused:
        assert old is not None
        vectors[list(reused)] = old.vectors[list(reused.values())]
    if fresh:
        vectors[fresh.kept] = fresh.vectors
    numbers = torch.tensor(kept, dtype=torch.int64)
    index = Index(
        model,
        [names[i] for i in kept],
        torch.tensor([stamps[i] for i in kept], dtype=torch.int64),
        vectors[numbers],
    )
    return index, numbers, skipped, len(reused)

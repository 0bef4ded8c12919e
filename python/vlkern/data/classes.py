"""The class of a picture, as a tokenizer gives it: one token."""

import difflib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from vlkern._files import reason, write_file
from vlkern.data.pairs import DataError
from vlkern.data.shards import PairShards
from vlkern.errors import UserError

#: The file of the names in the folder of a run or a model.
CLASSES = "classes.json"


def _name(text: str) -> str:
    return text.partition("/")[0].replace("_", " ")


class Classes:
    """Texts to the numbers of their classes: a `Tokenizer` whose rows have length 1.

    A class is a text up to its first slash: `food/fruit` is of the class "food".

    Args:
        names: of the classes, in the order of their numbers.

    Raises:
        ValueError: there is none, or one comes twice.

    Example:
        >>> classes = Classes(["animals", "food"])
        >>> classes(["food/fruit", "animals"]).tolist()
        [[1], [0]]
    """

    length, end = 1, -1

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)
        if not self.names or len(set(self.names)) < len(self.names):
            raise ValueError(f"names must be different and at least one, got {', '.join(self.names) or 'none'}")
        self._numbers = {name: number for number, name in enumerate(self.names)}

    @classmethod
    def of(cls, pairs: PairShards) -> "Classes":
        """Those of the pairs' captions (shards opened with the `caption_key` of their class), in alphabetical order."""
        texts = (text for index in range(len(pairs)) for text in pairs.captions_of(index))
        return cls(sorted({_name(text) for text in texts}))

    @property
    def vocabulary(self) -> int:
        """How many classes there are."""
        return len(self.names)

    def number(self, name: str) -> int:
        """Of a class. Raises UserError if there is none of this name."""
        if (found := self._numbers.get(_name(name))) is not None:
            return found
        close = difflib.get_close_matches(name, self.names, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(self.names)}"
        raise UserError(f"class {name!r} is unknown ({hint})")

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """B texts -> [B, 1] int64. Raises UserError for a class that is unknown."""
        return torch.tensor([[self.number(text)] for text in texts], dtype=torch.int64).reshape(-1, 1)

    def save(self, folder: str | Path) -> None:
        """Write what `load` reads."""
        write_file(Path(folder) / CLASSES, (json.dumps(self.names, ensure_ascii=False, indent=1) + "\n").encode())

    @classmethod
    def load(cls, folder: str | Path) -> "Classes":
        """Those that `save` wrote into this folder. Raises DataError if there are none."""
        file = Path(folder) / CLASSES
        try:
            names = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"{file}: cannot read ({reason(error)})") from error
        except ValueError as error:
            raise DataError(f"{file}: expected a list of names ({error})") from error
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError(f"{file}: expected a list of names")
        try:
            return cls(names)
        except ValueError as error:
            raise DataError(f"{file}: {error}") from error

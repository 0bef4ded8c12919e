"""A model with all that files need of it: probabilities for each level of exactness, and its name in headers."""

import functools
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from vlkern.codec.entropy import EntropyModel
from vlkern.codec.format import EXACTNESS
from vlkern.codec.steps import FloatEntropy
from vlkern.errors import UserError
from vlkern.models.m2t import M2T
from vlkern.models.pretrained import load_pretrained

#: The weights that are part of the package.
SHIPPED = Path(__file__).parent / "weights" / "m2t-small"


class Codec:
    """What `compress` and `decompress` need.

    Args:
        model: M2T, in float32.
        integer: its entropy model in whole numbers; without it only files of the level `float` can be made and read.

    Raises:
        ValueError: the model is MT, which has no fixed steps.

    Example:
        >>> codec = vlkern.codec.Codec(vlkern.models.create("m2t-tiny"))
        >>> codec.levels, codec.exactness
        (5, ('float',))
    """

    def __init__(self, model: M2T, integer: EntropyModel | None = None) -> None:
        if model.config.bidirectional:
            raise ValueError("model must be M2T, got MT: it has no fixed steps")
        self.model = model.eval()
        self._entropies: dict[str, EntropyModel] = {"float": FloatEntropy(model)}
        if integer is not None:
            self._entropies["integer"] = integer
        self._names: dict[str, bytes] = {}

    @property
    def levels(self) -> int:
        """Of quality, counted from 0."""
        return self.model.config.levels

    @property
    def exactness(self) -> tuple[str, ...]:
        """The levels of exactness that this codec has, the one that it takes by itself last."""
        return tuple(name for name in EXACTNESS if name in self._entropies)

    def entropy(self, exactness: str) -> EntropyModel:
        """The probabilities of a level of exactness.

        Raises:
            ValueError: there is no such level, or this codec does not have it.
        """
        if exactness not in EXACTNESS:
            raise ValueError(f"exact must be one of {', '.join(EXACTNESS)}, got {exactness!r}")
        if exactness not in self._entropies:
            raise ValueError(f"exact must be {' or '.join(self.exactness)} with this model, got {exactness!r}")
        return self._entropies[exactness]

    def name(self, exactness: str) -> bytes:
        """8 bytes of a SHA-256 over the configuration and all tensors that a file of this level depends on."""
        if exactness not in self._names:
            digest = hashlib.sha256(repr(self.model.config).encode())
            _add(digest, self.model.state_dict())
            if exactness == "integer":
                _add(digest, self._entropies["integer"].tensors())
            self._names[exactness] = digest.digest()[:8]
        return self._names[exactness]


def _add(digest: "hashlib._Hash", tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())


def load(folder: str | os.PathLike[str] | None = None) -> Codec:
    """A codec, on the CPU.

    Args:
        folder: of `save_pretrained`; None is the codec that is part of the package, which is loaded once.

    Raises:
        UserError: the folder holds no M2T.
    """
    return _shipped() if folder is None else _load(Path(folder))


@functools.cache
def _shipped() -> Codec:
    return _load(SHIPPED)


def _load(folder: Path) -> Codec:
    model = load_pretrained(folder, dtype=torch.float32)
    if not isinstance(model, M2T):
        raise UserError(f"{folder}: expected an M2T, got {type(model).__name__}")
    return Codec(model)

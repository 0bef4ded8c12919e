"""A model with all that files need of it: probabilities for each level of exactness, and its name in headers."""

import functools
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from vlkern.codec.entropy import EntropyModel
from vlkern.codec.format import EXACTNESS
from vlkern.codec.integer import IntegerEntropy, Weights
from vlkern.codec.integer.weights import FILE
from vlkern.codec.pack import TRANSFORMS, unpack
from vlkern.codec.steps import FloatEntropy
from vlkern.errors import UserError
from vlkern.models.m2t import M2T
from vlkern.models.pretrained import load_pretrained

#: The weights that are part of the package.
SHIPPED = Path(__file__).parent / "weights" / "m2t-small"


class Codec:
    """What `compress` and `decompress` need.

    Args:
        model: M2T, in float32; without its transformer only files of the level `integer` can be made and read.
        integer: its entropy model in whole numbers; without it only files of the level `float` can be made and read.
        device: where to compute.

    Raises:
        ValueError: the model is MT, which has no fixed steps, or the whole numbers are not those of such a model.

    Example:
        >>> codec = vlkern.codec.Codec(vlkern.models.create("m2t-tiny"))
        >>> codec.levels, codec.exactness
        (5, ('float',))
    """

    def __init__(self, model: M2T, integer: Weights | None = None, *, device: torch.device | str = "cpu") -> None:
        if model.config.bidirectional:
            raise ValueError("model must be M2T, got MT: it has no fixed steps")
        self.model, self._integer = model.eval().to(device), integer
        self._entropies: dict[str, EntropyModel] = {}
        if hasattr(model, "entropy"):
            self._entropies["float"] = FloatEntropy(self.model)
        if integer is not None:
            self._entropies["integer"] = IntegerEntropy(model.config, integer, device=device)
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
            tensors = self.model.state_dict()
            if exactness == "integer" and self._integer is not None:
                tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("entropy.")}
                _add(digest, self._integer.tensors())
            _add(digest, tensors)
            self._names[exactness] = digest.digest()[:8]
        return self._names[exactness]


def _add(digest: "hashlib._Hash", tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())


def load(folder: str | os.PathLike[str] | None = None, *, device: torch.device | str = "cpu") -> Codec:
    """The codec of a folder.

    Args:
        folder: of `save_pretrained`, with the whole numbers beside it if there are any, or of `pack`;
            None is the codec that is part of the package, which is loaded once.
        device: where to compute. Files of the level `float` are read on the kind of device that made them.

    Raises:
        UserError: the folder holds no M2T.
    """
    return _shipped(str(device)) if folder is None else _load(Path(folder), device)


@functools.cache
def _shipped(device: str) -> Codec:
    if not (SHIPPED / "config.json").is_file():
        raise UserError("this build of vlkern comes without weights for pictures: give a folder of `vlkern train m2t`")
    return _load(SHIPPED, device)


def _load(folder: Path, device: torch.device | str) -> Codec:
    packed = (folder / TRANSFORMS).is_file()
    model = unpack(folder) if packed else load_pretrained(folder, dtype=torch.float32)
    if not isinstance(model, M2T):
        raise UserError(f"{folder}: expected an M2T, got {type(model).__name__}")
    integer = Weights.load(folder, model.config) if (folder / FILE).is_file() else None
    return Codec(model, integer, device=device)

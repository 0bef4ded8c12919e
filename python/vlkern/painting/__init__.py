"""Pictures out of models: samples and reconstructions for `vlkern generate`, figures for `vlkern eval pictures`."""

from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from vlkern.errors import UserError
from vlkern.painting.base import Measures, Options, Pictures

__all__ = ["Measures", "Options", "Pictures", "painter_of"]

#: class of a model -> module of its painter
_PAINTERS: dict[str, str] = {
    "Givt": "vlkern.painting.givt",
    "FsqAutoencoder": "vlkern.painting.fsq",
    "Jet": "vlkern.painting.jet",
    "JetFormer": "vlkern.painting.jetformer",
    "MaskGit": "vlkern.painting.maskgit",
    "Vae": "vlkern.painting.vae",
}


class Painter(Protocol):
    """What a module of `_PAINTERS` has."""

    def paint(self, model: Any, folder: Path, options: Options) -> torch.Tensor:
        """[count, 3, S, S] uint8. `folder` is the model's, with its classes, tokenizer and autoencoder.

        Raises:
            UserError: the model cannot do what the options ask for.
        """

    def measure(self, model: Any, folder: Path, pictures: Pictures) -> Measures:
        """How well the model does on pictures that it never saw."""


def painter_of(model: nn.Module) -> Painter:
    """The painter of a model. Raises UserError if it makes no pictures."""
    name = type(model).__name__
    if name not in _PAINTERS:
        raise UserError(f"expected a model that makes pictures ({', '.join(_PAINTERS)}), got {name}")
    painter: Any = import_module(_PAINTERS[name])
    return painter

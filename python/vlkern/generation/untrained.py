"""Models of any size without a checkpoint, for timing: random weights, and bytes in place of their tokenizers."""

import math
from typing import Any

import torch
from torch import nn

from vlkern import models
from vlkern.data.vocabulary import BytePieces
from vlkern.errors import UserError
from vlkern.layers.init import shapes_only
from vlkern.models.gemma import Gemma
from vlkern.models.multimodal import Multimodal


class Numbers(BytePieces):
    """A vocabulary as large as a model's: prompts are bytes, and an id that is none is written as its number.

    Example:
        >>> Numbers(262_144).piece(262_000)
        b' 262000'
    """

    def __init__(self, size: int, names: dict[str, int] | None = None) -> None:
        super().__init__()
        self._known, self._names = self.size, names or {}
        self.size = max(size, self._known)

    @property
    def _first_location(self) -> int:
        return self._known - self.LOCATIONS

    def piece(self, token: int) -> bytes:
        """See `Vocabulary.piece`."""
        return super().piece(token) if token < self._known else f" {token}".encode()

    def token(self, name: str) -> int | None:
        """See `Vocabulary.token`."""
        return self._names.get(name, super().token(name))


def numbers_of(model: Any) -> Numbers:
    """The vocabulary of a model without a tokenizer."""
    c = model.config
    if not isinstance(model, Multimodal):
        return Numbers(c.vocabulary)
    names = {f"<{name}>": getattr(c, name) for name in ("start_of_image", "end_of_image") if hasattr(c, name)}
    return Numbers(c.sampled_vocabulary, names)


def random_model(name: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Any:
    """The preset `name` with random weights that keep activations at an ordinary size. Never more than one copy of it.

    Raises:
        UserError: no model that generates has this name.

    Example:
        >>> model = random_model("gemma3-tiny", dtype=torch.bfloat16)
    """
    with shapes_only():
        try:
            model: Any = models.create(name)
        except ValueError as error:
            known = [n for n in models.list_models() if "gemma" in n]
            raise UserError(f"--random-weights {name}: expected one of {', '.join(known)}") from error
    if not isinstance(model, Gemma | Multimodal):
        raise UserError(f"--random-weights {name}: expected a model that generates, got {type(model).__name__}")
    model = model.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            for p in module.parameters(recurse=False):
                if p.dim() > 1:
                    # Variance 1 / fan-in.
                    bound = math.sqrt(3 / (p.numel() // len(p)))
                    p.uniform_(-bound, bound, generator=generator)
                elif isinstance(module, nn.LayerNorm) and p is module.weight:
                    p.fill_(1.0)
                else:
                    p.zero_()
    return model

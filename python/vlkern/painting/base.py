"""What a painter is asked for, and what it answers."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from vlkern.errors import UserError


@dataclass(frozen=True)
class Options:
    """What to paint. None is the model's own default, or "not asked for".

    count: how many pictures.
    generator: of the CPU; all that is drawn comes from it.
    label: name of the class of all pictures.
    prompt: text that describes them.
    image: [3, S, S] uint8, for models that reconstruct.
    temperature, guidance, steps: of sampling.
    """

    count: int
    generator: torch.Generator
    label: str | None = None
    prompt: str | None = None
    image: torch.Tensor | None = None
    temperature: float | None = None
    guidance: float | None = None
    steps: int | None = None

    def only(self, model: str, *known: str) -> None:
        """Refuse what the model knows nothing of.

        Args:
            model: what it is called, "a Jet".
            known: of label, prompt, image, temperature, guidance, steps.

        Raises:
            UserError: another one is given.
        """
        flags = {"label": "class"}
        for name in ("label", "prompt", "image", "temperature", "guidance", "steps"):
            if name not in known and getattr(self, name) is not None:
                raise UserError(f"--{flags.get(name, name)}: {model} has no use for it")


@dataclass(frozen=True)
class Pictures:
    """n pictures that the model never saw, and what is known of them.

    pixels: [n, 3, S, S] uint8.
    captions: the first caption of each.
    classes: of each, as its .json says, or None.
    """

    pixels: torch.Tensor
    captions: Sequence[str]
    classes: Sequence[str | None]


@dataclass(frozen=True)
class Measures:
    """What was measured.

    numbers: name with its unit -> value.
    sheets: what is shown -> pictures [m, 3, S, S] uint8, eight in a row.
    bits: bits per sub-pixel in which the model describes the pictures, if it can say so.
    """

    numbers: dict[str, float] = field(default_factory=dict)
    sheets: dict[str, torch.Tensor] = field(default_factory=dict)
    bits: float | None = None

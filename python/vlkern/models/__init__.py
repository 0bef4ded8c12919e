"""Complete models by name, `create("siglip2-base-patch16-256")`, or from a checkpoint, `load_pretrained(DIR)`."""

import difflib
from collections.abc import Callable
from typing import Any

from torch import nn

from vlkern.models import (
    fsq_autoencoder,
    gemma,
    gemma3,
    givt,
    jet,
    jetformer,
    m2t,
    maskgit,
    naflex,
    navit,
    paligemma,
    siglip,
    vae,
    vit_vae,
)
from vlkern.models.pretrained import load_pretrained, save_pretrained

__all__ = ["create", "list_models", "load_pretrained", "save_pretrained"]

#: family module -> its model class; a family lists its configurations in PRESETS
_FAMILIES: tuple[tuple[dict[str, Any], Callable[[Any], nn.Module]], ...] = (
    (siglip.PRESETS, siglip.Siglip),
    (naflex.PRESETS, naflex.Naflex),
    (navit.PRESETS, navit.Navit),
    (gemma.PRESETS, gemma.Gemma),
    (paligemma.PRESETS, paligemma.PaliGemma),
    (gemma3.PRESETS, gemma3.Gemma3),
    (givt.PRESETS, givt.Givt),
    (fsq_autoencoder.PRESETS, fsq_autoencoder.FsqAutoencoder),
    (jet.PRESETS, jet.Jet),
    (jetformer.PRESETS, jetformer.JetFormer),
    (m2t.PRESETS, m2t.M2T),
    (maskgit.PRESETS, maskgit.MaskGit),
    (vae.PRESETS, vae.Vae),
    (vit_vae.PRESETS, vit_vae.VitVae),
)


def list_models() -> list[str]:
    """Names that `create` accepts, sorted."""
    return sorted(name for presets, _ in _FAMILIES for name in presets)


def create(name: str) -> nn.Module:
    """The model `name` with freshly drawn parameters (torch's global generator), float32, on the current device.

    Raises:
        ValueError: no model has this name.

    Example:
        >>> with torch.device("meta"):
        ...     model = vlkern.models.create("siglip2-base-patch16-256")
    """
    for presets, model in _FAMILIES:
        if name in presets:
            return model(presets[name])
    close = difflib.get_close_matches(str(name), list_models(), n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise ValueError(f"name must be one of {', '.join(list_models())}, got {name!r}{hint}")

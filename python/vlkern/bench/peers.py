"""transformers, timm and open_clip as peers: models of a configuration, with random parameters.

timm and open_clip import torchvision (whose build must match that of torch) and ftfy when they are imported, and use
neither in a model. Stand-ins take their places for as long as the import lasts.
"""

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from torch import nn

from vlkern.bench.rivals import Absent
from vlkern.models.naflex import NaflexConfig, NaflexVisionConfig
from vlkern.models.siglip import SiglipConfig, TowerConfig, VisionConfig

_STAND_INS = ("torchvision", "ftfy")


class _Name(type):
    """A class whose every attribute is a word."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _StandIn(ModuleType):
    """A module whose every attribute is a class."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name(name, (), {})


class _Finder:
    """Makes the stand-ins."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in _STAND_INS else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextlib.contextmanager
def _stand_ins() -> Iterator[None]:
    def present() -> list[str]:
        return [name for name in sys.modules if name.partition(".")[0] in _STAND_INS]

    real = {name: sys.modules.pop(name) for name in present()}
    finder: Any = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in present():
            del sys.modules[name]
        sys.modules.update(real)


def load(name: str) -> Any:
    """The package `name`. Raises Absent when it is not installed; one that does not import raises its own error."""
    if importlib.util.find_spec(name) is None:
        raise Absent(f"{name} is not installed")
    if name == "transformers":
        return importlib.import_module(name)
    with contextlib.suppress(ModuleNotFoundError):
        # open_clip imports it too, and it would remember the stand-ins as installed packages.
        importlib.import_module("transformers").is_torchvision_available()
    with _stand_ins():
        return importlib.import_module(name)


def transformers_config(c: SiglipConfig | NaflexConfig) -> Any:
    """transformers' SiglipConfig of the same sizes, or its Siglip2Config for a NaFlex model."""

    def tower(t: TowerConfig) -> dict[str, int]:
        return {
            "hidden_size": t.width,
            "num_hidden_layers": t.depth,
            "num_attention_heads": t.heads,
            "intermediate_size": t.mlp,
        }

    transformers = load("transformers")
    if isinstance(c.vision, NaflexVisionConfig):
        make, size = transformers.Siglip2Config, {"num_patches": c.vision.patches}
    else:
        make, size = transformers.SiglipConfig, {"image_size": c.vision.image_size[0]}
    return make(
        vision_config={**tower(c.vision), **size, "patch_size": c.vision.patch},
        text_config={
            **tower(c.text),
            "vocab_size": c.text.vocabulary,
            "max_position_embeddings": c.text.length,
            "projection_size": c.vision.width,
            # The default ids lie outside a small vocabulary.
            "bos_token_id": None,
            "eos_token_id": 1,
        },
    )


def timm_tower(c: VisionConfig) -> nn.Module:
    """timm's image tower, with the GELU of the original."""
    tower: nn.Module = load("timm").create_model(
        "vit_base_patch16_siglip_256",
        img_size=c.image_size,
        patch_size=c.patch,
        embed_dim=c.width,
        depth=c.depth,
        num_heads=c.heads,
        mlp_ratio=c.mlp / c.width,
        act_layer="gelu_tanh",
        num_classes=0,
    )
    return tower

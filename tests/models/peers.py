"""transformers, timm and open_clip as peers: models of any size with random parameters.

timm and open_clip import torchvision (whose build must match that of torch) and ftfy when they are imported, and use
neither in a model. Stand-ins take their places for as long as the import lasts.
"""

import contextlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch

from vlkern.models.siglip import SiglipConfig, TextConfig, TowerConfig, VisionConfig

_STAND_INS = ("torchvision", "ftfy")

CONFIGS = {
    "small": SiglipConfig(VisionConfig(16, 2, 2, 32, (16, 16), 8), TextConfig(16, 2, 2, 32, 30, 7)),
    # 30 pixels leave an incomplete patch, widths differ between the towers, heads of 13 and 7 channels.
    "odd": SiglipConfig(VisionConfig(39, 3, 3, 50, (30, 30), 7), TextConfig(21, 1, 3, 33, 19, 5)),
}


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
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in _STAND_INS else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextlib.contextmanager
def _stand_ins():
    ours = lambda: [name for name in sys.modules if name.partition(".")[0] in _STAND_INS]  # noqa: E731
    real = {name: sys.modules.pop(name) for name in ours()}
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in ours():
            del sys.modules[name]
        sys.modules.update(real)


def load(name: str) -> Any:
    """The package `name`; the test is skipped when it is not installed, and fails when it does not import."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    if name == "transformers":
        return importlib.import_module(name)
    with contextlib.suppress(ModuleNotFoundError):
        # open_clip imports it too, and it would remember the stand-ins as installed packages.
        importlib.import_module("transformers").is_torchvision_available()
    with _stand_ins():
        return importlib.import_module(name)


def transformers_config(c: SiglipConfig) -> Any:
    def tower(t: TowerConfig) -> dict[str, int]:
        return {
            "hidden_size": t.width,
            "num_hidden_layers": t.depth,
            "num_attention_heads": t.heads,
            "intermediate_size": t.mlp,
        }

    return load("transformers").SiglipConfig(
        vision_config={**tower(c.vision), "image_size": c.vision.image_size[0], "patch_size": c.vision.patch},
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


def timm_tower(c: VisionConfig) -> torch.nn.Module:
    """timm's image tower, with the GELU of the original."""
    return load("timm").create_model(
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


def open_clip_model(c: SiglipConfig) -> torch.nn.Module:
    """open_clip's SigLIP, with the GELU of the original in both towers."""
    open_clip = load("open_clip")
    published = open_clip.get_model_config("ViT-B-16-SigLIP2-256")
    text = {key: value for key, value in published["text_cfg"].items() if key != "hf_tokenizer_name"}
    text |= {
        "width": c.text.width,
        "layers": c.text.depth,
        "heads": c.text.heads,
        "mlp_ratio": c.text.mlp / c.text.width,
        "vocab_size": c.text.vocabulary,
        "context_length": c.text.length,
    }
    model = open_clip.CustomTextCLIP(
        embed_dim=c.vision.width,
        vision_cfg={**published["vision_cfg"], "image_size": 32},
        text_cfg=text,
        init_logit_scale=2.0,
        init_logit_bias=-10.0,
    )
    model.visual.trunk = timm_tower(c.vision)
    return model


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int = 3) -> torch.nn.Module:
    """Every parameter anew, also those that start at zero or one."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model.eval()

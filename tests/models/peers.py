"""transformers, timm and open_clip as peers: small and odd configurations, random parameters."""

from typing import Any

import pytest
import torch

from vlkern.bench import peers
from vlkern.bench.peers import timm_tower, transformers_config
from vlkern.bench.rivals import Absent
from vlkern.models.siglip import SiglipConfig, TextConfig, VisionConfig

__all__ = ["CONFIGS", "load", "open_clip_model", "randomize", "timm_tower", "transformers_config"]

CONFIGS = {
    "small": SiglipConfig(VisionConfig(16, 2, 2, 32, (16, 16), 8), TextConfig(16, 2, 2, 32, 30, 7)),
    # 30 pixels leave an incomplete patch, widths differ between the towers, heads of 13 and 7 channels.
    "odd": SiglipConfig(VisionConfig(39, 3, 3, 50, (30, 30), 7), TextConfig(21, 1, 3, 33, 19, 5)),
}


def load(name: str) -> Any:
    """The package `name`; the test is skipped when it is not installed, and fails when it does not import."""
    try:
        return peers.load(name)
    except Absent as reason:
        pytest.skip(str(reason))


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

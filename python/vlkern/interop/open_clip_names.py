"""SigLIP models with open_clip's names (`ViT-*-SigLIP*`). open_clip itself is not needed and not imported.

open_clip gives the text towers of SigLIP 1 the exact GELU; the models were trained with its tanh approximation, which
is what runs here.
"""

from collections.abc import Collection

from vlkern.interop import timm
from vlkern.interop._shapes import Plan, given, no_head, text_config
from vlkern.models.siglip import SiglipConfig, TextConfig
from vlkern.models.state import Checkpoint, Source, layers, same

_IMAGE, _TEXT = "visual.trunk.", "text."


def knows(names: Collection[str]) -> bool:
    """Whether these are the names of an open_clip SigLIP."""
    return any(name.startswith(_IMAGE) for name in names)


def plan(checkpoint: Checkpoint, config: object = None) -> Plan:
    """How to read Siglip; `config` is what the file holds, None to tell by its shapes.

    Raises:
        UserError: the shapes do not tell it, or `config` is no SiglipConfig.
    """
    c = given(checkpoint, config, SiglipConfig) or _size(checkpoint)
    found = {f"vision_model.{name}": source for name, source in timm.sources(c.vision, _IMAGE).items()}
    found |= {f"text_model.{name}": source for name, source in _text_sources(c.text).items()}
    for name in ("logit_scale", "logit_bias"):
        found[name] = Source((name,), lambda number: number.reshape(1))
    found |= no_head(checkpoint, c, f"{_TEXT}text_projection", f"{_TEXT}ln_final.weight")
    return Plan(c, found)


def _size(checkpoint: Checkpoint) -> SiglipConfig:
    depth = layers(checkpoint.shapes, f"{_TEXT}transformer.resblocks.")
    names = ("token_embedding.weight", "positional_embedding", "transformer.resblocks.0.mlp.c_fc.weight")
    text = text_config(checkpoint, *(f"{_TEXT}{name}" for name in names), depth=depth)
    return SiglipConfig(timm.size(checkpoint, _IMAGE), text)


def _text_sources(c: TextConfig) -> dict[str, Source]:
    found = {
        "embeddings.token_embedding.weight": same(f"{_TEXT}token_embedding.weight"),
        "embeddings.position_embedding.weight": same(f"{_TEXT}positional_embedding"),
    }

    def pair(ours: str, theirs: str) -> None:
        for kind in ("weight", "bias"):
            found[f"{ours}.{kind}"] = same(f"{_TEXT}{theirs}.{kind}")

    pair("final_layer_norm", "ln_final")
    pair("head", "text_projection")
    for i in range(c.depth):
        ours, theirs = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
        pair(f"{ours}.layer_norm1", f"{theirs}.ln_1")
        pair(f"{ours}.layer_norm2", f"{theirs}.ln_2")
        pair(f"{ours}.self_attn.out_proj", f"{theirs}.attn.out_proj")
        pair(f"{ours}.mlp.fc1", f"{theirs}.mlp.c_fc")
        pair(f"{ours}.mlp.fc2", f"{theirs}.mlp.c_proj")
        for kind in ("weight", "bias"):
            fused = timm.split(f"{_TEXT}{theirs}.attn.in_proj_{kind}")
            found |= {f"{ours}.self_attn.{part}_proj.{kind}": fused[part] for part in fused}
    return found

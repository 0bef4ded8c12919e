"""Image towers with timm's names (`vit_*_siglip_*`). timm itself is not needed and not imported.

timm gives some of these models the exact GELU; the models were trained with its tanh approximation, which is what runs
here.
"""

from collections.abc import Collection

import torch

from vlkern.interop._shapes import Plan, given, vision_config
from vlkern.models.siglip import VisionConfig
from vlkern.models.state import Checkpoint, Source, layers, same


def knows(names: Collection[str]) -> bool:
    """Whether these are the names of a timm SigLIP tower."""
    return "attn_pool.latent" in names


def plan(checkpoint: Checkpoint, config: object = None) -> Plan:
    """How to read VisionTower; `config` is what the file holds, None to tell by its shapes.

    Raises:
        UserError: the shapes do not tell it, or `config` is no VisionConfig.
    """
    c = given(checkpoint, config, VisionConfig) or size(checkpoint)
    return Plan(c, sources(c))


def size(checkpoint: Checkpoint, root: str = "") -> VisionConfig:
    """The configuration by the shapes of the tensors whose names begin with `root`.

    Raises:
        UserError: they do not tell it.
    """
    depth = layers(checkpoint.shapes, f"{root}blocks.")
    names = (f"{root}{name}" for name in ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight"))
    return vision_config(checkpoint, *names, depth=depth)


def sources(c: VisionConfig, root: str = "") -> dict[str, Source]:
    """Parameter of VisionTower -> tensors of timm's `VisionTransformer`, whose names begin with `root`."""
    found = {
        "embeddings.position_embedding.weight": Source((f"{root}pos_embed",), lambda table: table.squeeze(0)),
        "head.probe": same(f"{root}attn_pool.latent"),
    }

    def pair(ours: str, theirs: str) -> None:
        for kind in ("weight", "bias"):
            found[f"{ours}.{kind}"] = same(f"{root}{theirs}.{kind}")

    pair("embeddings.patch_embedding", "patch_embed.proj")
    pair("post_layernorm", "norm")
    pair("head.layernorm", "attn_pool.norm")
    pair("head.attention.out_proj", "attn_pool.proj")
    pair("head.mlp.fc1", "attn_pool.mlp.fc1")
    pair("head.mlp.fc2", "attn_pool.mlp.fc2")
    for kind in ("weight", "bias"):
        parts = tuple(f"{root}attn_pool.{part}.{kind}" for part in ("q", "kv"))
        found[f"head.attention.in_proj_{kind}"] = Source(parts, lambda q, kv: torch.cat((q, kv)))
    for i in range(c.depth):
        ours, theirs = f"encoder.layers.{i}", f"blocks.{i}"
        pair(f"{ours}.layer_norm1", f"{theirs}.norm1")
        pair(f"{ours}.layer_norm2", f"{theirs}.norm2")
        pair(f"{ours}.self_attn.out_proj", f"{theirs}.attn.proj")
        pair(f"{ours}.mlp.fc1", f"{theirs}.mlp.fc1")
        pair(f"{ours}.mlp.fc2", f"{theirs}.mlp.fc2")
        for kind in ("weight", "bias"):
            fused = split(f"{root}{theirs}.attn.qkv.{kind}")
            found |= {f"{ours}.self_attn.{part}_proj.{kind}": fused[part] for part in fused}
    return found


def split(name: str) -> dict[str, Source]:
    """q, k and v out of the tensor `name`, where they lie one above the other."""

    def part(index: int) -> Source:
        def rows(fused: torch.Tensor) -> torch.Tensor:
            return fused.unflatten(0, (3, -1))[index]

        return Source((name,), rows)

    return {letter: part(index) for index, letter in enumerate("qkv")}

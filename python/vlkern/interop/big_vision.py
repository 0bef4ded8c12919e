"""SigLIP models with big_vision's names, as in its .npz files: every layer by itself, or all layers stacked (`scan`).

Flax lays tensors out differently: dense kernels are [in, out], those of attention [in, heads, channels] (output:
[heads, channels, out]), convolutions [height, width, in, out].
"""

from collections.abc import Callable, Collection

import torch

from vlkern.interop._shapes import Plan, given, image_size, no_head, patch_side
from vlkern.models.naflex import NaflexConfig, NaflexVisionConfig
from vlkern.models.siglip import SiglipConfig, TextConfig, VisionConfig
from vlkern.models.state import Checkpoint, Source, layers, need

Layout = Callable[[torch.Tensor], torch.Tensor]
#: Part of a parameter -> (flax name, how its array becomes a torch tensor).
Table = dict[str, tuple[str, Layout]]


def _same(a: torch.Tensor) -> torch.Tensor:
    return a


def _dense(kernel: torch.Tensor) -> torch.Tensor:
    return kernel.permute(1, 0)


def _heads(kernel: torch.Tensor) -> torch.Tensor:
    return kernel.flatten(1, 2).permute(1, 0)


def _output(kernel: torch.Tensor) -> torch.Tensor:
    return kernel.flatten(0, 1).permute(1, 0)


def _convolution(kernel: torch.Tensor) -> torch.Tensor:
    return kernel.permute(3, 2, 0, 1)


def _flat(bias: torch.Tensor) -> torch.Tensor:
    return bias.flatten(0, 1)


def _rows(table: torch.Tensor) -> torch.Tensor:
    return table.squeeze(0)


def _grid(table: torch.Tensor) -> torch.Tensor:
    return table.flatten(0, 1)


def linear(ours: str, theirs: str, layout: Layout = _dense, bias: Layout = _same) -> Table:
    """A dense layer."""
    return {f"{ours}.weight": (f"{theirs}/kernel", layout), f"{ours}.bias": (f"{theirs}/bias", bias)}


def norm(ours: str, theirs: str) -> Table:
    """A LayerNorm."""
    return {f"{ours}.weight": (f"{theirs}/scale", _same), f"{ours}.bias": (f"{theirs}/bias", _same)}


_ATTENTION = "MultiHeadDotProductAttention_0"
#: A pre-LN transformer block.
BLOCK: Table = {
    **norm("layer_norm1", "LayerNorm_0"),
    **linear("self_attn.q_proj", f"{_ATTENTION}/query", _heads, _flat),
    **linear("self_attn.k_proj", f"{_ATTENTION}/key", _heads, _flat),
    **linear("self_attn.v_proj", f"{_ATTENTION}/value", _heads, _flat),
    **linear("self_attn.out_proj", f"{_ATTENTION}/out", _output),
    **norm("layer_norm2", "LayerNorm_1"),
    **linear("mlp.fc1", "MlpBlock_0/Dense_0"),
    **linear("mlp.fc2", "MlpBlock_0/Dense_1"),
}
_IMAGE: Table = {
    **linear("embeddings.patch_embedding", "embedding", _convolution),
    "embeddings.position_embedding.weight": ("pos_embedding", _rows),
    **norm("post_layernorm", "Transformer/encoder_norm"),
}
#: Patches come as rows of numbers already, in the order that the kernel has; positions are a grid.
_NAFLEX_IMAGE: Table = {
    **_IMAGE,
    **linear("embeddings.patch_embedding", "embedding"),
    "embeddings.position_embedding.weight": ("pos_embedding", _grid),
}
_TEXT: Table = {
    "embeddings.token_embedding.weight": ("Embed_0/embedding", _same),
    "embeddings.position_embedding.weight": ("pos_embedding", _rows),
    **norm("final_layer_norm", "Encoder_0/encoder_norm"),
    **linear("head", "head"),
}
_MAP: Table = {
    "probe": ("MAPHead_0/probe", _same),
    **linear("attention.out_proj", f"MAPHead_0/{_ATTENTION}/out", _output),
    **norm("layernorm", "MAPHead_0/LayerNorm_0"),
    **linear("mlp.fc1", "MAPHead_0/MlpBlock_0/Dense_0"),
    **linear("mlp.fc2", "MAPHead_0/MlpBlock_0/Dense_1"),
}
_IMAGE_ROOT, _TEXT_ROOT = "img/", "txt/"


def knows(names: Collection[str]) -> bool:
    """Whether these are the names of two towers or of an image tower."""
    return any(f"{root}{tower}embedding/kernel" in names for root in ("params/", "") for tower in (_IMAGE_ROOT, ""))


def plan(checkpoint: Checkpoint, config: object = None) -> Plan:
    """How to read Siglip or Naflex, or an image tower when there is nothing else; `config` is what the file holds,
    None to tell by its shapes, which leave nothing open when pictures are square.

    Raises:
        UserError: the shapes do not tell it, or `config` is of the wrong kind.
    """
    names = checkpoint.shapes
    root = "params/" if any(name.startswith("params/") for name in names) else ""
    stacked = any("/encoderblock/" in name for name in names)
    two = f"{root}{_IMAGE_ROOT}embedding/kernel" in names
    image_root = root + _IMAGE_ROOT if two else root
    naflex = names[f"{image_root}embedding/kernel"].dim() == 2
    if not two:
        image: VisionConfig | NaflexVisionConfig
        if naflex:
            image = given(checkpoint, config, NaflexVisionConfig) or _naflex_vision_config(checkpoint, root)
        else:
            image = given(checkpoint, config, VisionConfig) or vision_config(checkpoint, root)
        return Plan(image, image_sources(image, root, stacked=stacked), root)
    c: SiglipConfig | NaflexConfig
    if naflex:
        c = given(checkpoint, config, NaflexConfig) or NaflexConfig(
            _naflex_vision_config(checkpoint, image_root), _text_config(checkpoint, root + _TEXT_ROOT)
        )
    else:
        c = given(checkpoint, config, SiglipConfig) or SiglipConfig(
            vision_config(checkpoint, image_root), _text_config(checkpoint, root + _TEXT_ROOT)
        )
    found = {
        "logit_scale": Source((f"{root}t",), lambda number: number.reshape(1)),
        "logit_bias": Source((f"{root}b",), lambda number: number.reshape(1)),
    }
    for name, source in image_sources(c.vision, image_root, stacked=stacked).items():
        found[f"vision_model.{name}"] = source
    for name, source in text_sources(c.text, root + _TEXT_ROOT, stacked=stacked).items():
        found[f"text_model.{name}"] = source
    if isinstance(c, SiglipConfig):
        found |= no_head(checkpoint, c, f"{root}{_TEXT_ROOT}head/", f"{root}{_TEXT_ROOT}Encoder_0/encoder_norm/scale")
    return Plan(c, found, root)


def image_sources(c: VisionConfig | NaflexVisionConfig, root: str, *, stacked: bool) -> dict[str, Source]:
    """Parameter of VisionTower, or of NaflexVisionTower -> arrays."""
    head = {f"head.{name}": source for name, source in map_sources(root).items()}
    return encoder_sources(c, root, stacked=stacked) | head


def encoder_sources(c: VisionConfig | NaflexVisionConfig, root: str, *, stacked: bool) -> dict[str, Source]:
    """Parameter of VisionEncoder -> arrays: of a tower all but the pooling head."""
    table = _NAFLEX_IMAGE if isinstance(c, NaflexVisionConfig) else _IMAGE
    return _from(table, root) | _blocks(f"{root}Transformer", c.depth, stacked)


def text_sources(c: TextConfig, root: str, *, stacked: bool) -> dict[str, Source]:
    """Parameter of TextTower -> arrays."""
    return _from(_TEXT, root) | _blocks(f"{root}Encoder_0", c.depth, stacked)


def map_sources(root: str) -> dict[str, Source]:
    """Parameter of MapHead -> arrays: query, key and value come to lie in one matrix."""
    parts = [f"{root}MAPHead_0/{_ATTENTION}/{word}" for word in ("query", "key", "value")]

    def fused(kind: str, layout: Layout) -> Source:
        return Source(tuple(f"{part}/{kind}" for part in parts), lambda *qkv: torch.cat([layout(a) for a in qkv]))

    return _from(_MAP, root) | {
        "attention.in_proj_weight": fused("kernel", _heads),
        "attention.in_proj_bias": fused("bias", _flat),
    }


def _from(table: Table, root: str) -> dict[str, Source]:
    return {ours: Source((f"{root}{theirs}",), layout) for ours, (theirs, layout) in table.items()}


def _blocks(root: str, depth: int, stacked: bool) -> dict[str, Source]:
    def layer(layout: Layout, i: int) -> Layout:
        def of_stack(stack: torch.Tensor) -> torch.Tensor:
            if stack.shape[0] != depth:
                raise ValueError(f"expected {depth} layers, got {stack.shape[0]}")
            return layout(stack[i])

        return of_stack if stacked else layout

    folder = "encoderblock" if stacked else "encoderblock_{}"
    return {
        f"encoder.layers.{i}.{ours}": Source((f"{root}/{folder.format(i)}/{theirs}",), layer(layout, i))
        for i in range(depth)
        for ours, (theirs, layout) in BLOCK.items()
    }


def _block_sizes(checkpoint: Checkpoint, root: str) -> tuple[int, int, int]:
    """Depth, heads and hidden units of the encoder `root`."""
    query, fc1 = f"{_ATTENTION}/query/kernel", "MlpBlock_0/Dense_0/kernel"
    depth = layers(checkpoint.shapes, f"{root}/encoderblock_")
    if depth:
        attention, mlp = need(checkpoint, {f"{root}/encoderblock_0/{query}": 3, f"{root}/encoderblock_0/{fc1}": 2})
        return depth, attention[1], mlp[1]
    attention, mlp = need(checkpoint, {f"{root}/encoderblock/{query}": 4, f"{root}/encoderblock/{fc1}": 3})
    return attention[0], attention[2], mlp[2]


def vision_config(checkpoint: Checkpoint, root: str) -> VisionConfig:
    """Of the image tower whose arrays' names begin with `root`, for square pictures."""
    conv, positions = need(checkpoint, {f"{root}embedding/kernel": 4, f"{root}pos_embedding": 3})
    depth, heads, mlp = _block_sizes(checkpoint, f"{root}Transformer")
    size = image_size(checkpoint, positions[1], conv[0])
    return VisionConfig(conv[3], depth, heads, mlp, image_size=size, patch=conv[0])


def _naflex_vision_config(checkpoint: Checkpoint, root: str) -> NaflexVisionConfig:
    kernel, positions = need(checkpoint, {f"{root}embedding/kernel": 2, f"{root}pos_embedding": 3})
    depth, heads, mlp = _block_sizes(checkpoint, f"{root}Transformer")
    return NaflexVisionConfig(kernel[1], depth, heads, mlp, patch=patch_side(checkpoint, kernel[0]), side=positions[0])


def _text_config(checkpoint: Checkpoint, root: str) -> TextConfig:
    tokens, positions = need(checkpoint, {f"{root}Embed_0/embedding": 2, f"{root}pos_embedding": 3})
    depth, heads, mlp = _block_sizes(checkpoint, f"{root}Encoder_0")
    return TextConfig(tokens[1], depth, heads, mlp, vocabulary=tokens[0], length=positions[1])

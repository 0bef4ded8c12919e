"""transformers' PaliGemma and Gemma 3 with random weights, their configurations as ours, and prompts for both."""

from typing import Any

import torch
from peers import load, randomize

from vlkern.models.gemma import GemmaConfig
from vlkern.models.gemma3 import Gemma3, Gemma3Config
from vlkern.models.paligemma import PaliGemma, PaliGemmaConfig
from vlkern.models.siglip import VisionConfig

#: 21 x 21 pixels in patches of 7: 9 tokens an image; heads of 10 channels.
VISION = VisionConfig(width=30, depth=2, heads=3, mlp=50, image_size=(21, 21), patch=7)
_SIZES: dict[str, Any] = {"width": 24, "depth": 3, "heads": 4, "head_dim": 8, "mlp": 36, "context": 128}
PALIGEMMA = {
    "gemma": PaliGemmaConfig(
        VISION, GemmaConfig(**_SIZES, kv_heads=1, query_scalar=8, version=1, vocabulary=64), 60, 60
    ),
    "gemma2": PaliGemmaConfig(
        VISION,
        GemmaConfig(
            **_SIZES, kv_heads=2, query_scalar=11, version=2, vocabulary=64, pattern="LG", window=12,
            attention_softcap=2.0, final_softcap=3.0, whole_prefix=True,
        ),
        60,
        60,
    ),
}  # fmt: skip
#: 36 x 36 pixels in 6 x 6 patches, pooled to 9 tokens; the window is smaller than an image.
GEMMA3 = Gemma3Config(
    VisionConfig(width=30, depth=2, heads=3, mlp=50, image_size=(36, 36), patch=6),
    GemmaConfig(
        **_SIZES, kv_heads=2, query_scalar=11, version=3, vocabulary=64, pattern="LLG", window=5, rope_base=1e6,
        rope_factor=8.0,
    ),
    image_tokens=9, image_token=62, start_of_image=60, end_of_image=61, sampled_vocabulary=62,
)  # fmt: skip


def vision_json(c: VisionConfig, out: int) -> dict[str, Any]:
    return {
        "model_type": "siglip_vision_model", "hidden_size": c.width, "num_hidden_layers": c.depth,
        "num_attention_heads": c.heads, "intermediate_size": c.mlp, "image_size": c.image_size[0],
        "patch_size": c.patch, "vision_use_head": False, "projection_dim": out,
    }  # fmt: skip


def language_json(c: GemmaConfig) -> dict[str, Any]:
    entries: dict[str, Any] = {
        "model_type": {1: "gemma", 2: "gemma2", 3: "gemma3_text"}[c.version], "hidden_size": c.width,
        "num_hidden_layers": c.depth, "num_attention_heads": c.heads, "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim, "intermediate_size": c.mlp, "vocab_size": c.vocabulary,
        "max_position_embeddings": c.context,
    }  # fmt: skip
    if c.version > 1:
        entries |= {
            "query_pre_attn_scalar": c.query_scalar, "sliding_window": c.window,
            "attn_logit_softcapping": c.attention_softcap, "final_logit_softcapping": c.final_softcap,
            "layer_types": [{"L": "sliding_attention", "G": "full_attention"}[kind] for kind in c.kinds],
        }  # fmt: skip
    if c.version == 3:
        entries["rope_parameters"] = {
            "full_attention": {"rope_type": "linear", "factor": c.rope_factor, "rope_theta": c.rope_base},
            "sliding_attention": {"rope_type": "default", "rope_theta": c.local_rope_base},
        }
    return entries


def theirs(c: PaliGemmaConfig | Gemma3Config, **options: Any) -> torch.nn.Module:
    """transformers' model of this configuration, with what transformers draws."""
    transformers = load("transformers")
    vision, language = vision_json(c.vision, c.language.width), language_json(c.language)
    if isinstance(c, PaliGemmaConfig):
        config = transformers.PaliGemmaConfig(
            vision_config=vision, text_config=language, projection_dim=c.language.width,
            hidden_size=c.language.width, image_token_index=c.image_token,
        )  # fmt: skip
        kind = transformers.PaliGemmaForConditionalGeneration
    else:
        config = transformers.Gemma3Config(
            vision_config=vision, text_config=language, mm_tokens_per_image=c.image_tokens,
            image_token_index=c.image_token, boi_token_index=c.start_of_image, eoi_token_index=c.end_of_image,
        )  # fmt: skip
        kind = transformers.Gemma3ForConditionalGeneration
    return kind._from_config(config, attn_implementation="eager", **options)


def hub_name(name: str) -> str:
    """A parameter of transformers 5 as the released files name it."""
    name = name.removeprefix("model.")
    name = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    return name.replace("language_model.", "language_model.model.", 1)


def pair(c: PaliGemmaConfig | Gemma3Config) -> tuple[Any, Any]:
    """Ours and theirs with the same random weights."""
    their_model = randomize(theirs(c))
    our_model = PaliGemma(c) if isinstance(c, PaliGemmaConfig) else Gemma3(c)
    state = {hub_name(name): p for name, p in their_model.state_dict().items() if name != "lm_head.weight"}
    our_model.load_state_dict(state)
    return our_model.eval(), their_model.eval()


def same_gradients(ours: Any, theirs: Any, got: torch.Tensor, expected: torch.Tensor) -> None:
    """Backpropagate random slopes through both logits, and compare every parameter's gradient."""
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(1))
    (got * weight).sum().backward()
    (expected * weight).sum().backward()
    there = {name.split(".", 1)[1].replace("language_model.", ""): p for name, p in theirs.named_parameters()}
    names = {
        name.replace("vision_tower.vision_model.", "vision_tower.").replace("language_model.model.", ""): p
        for name, p in ours.named_parameters()
    }
    assert names.keys() <= there.keys()
    span = max(float(p.grad.abs().max()) for p in names.values())
    for name, p in names.items():
        assert float((p.grad - there[name].grad).abs().max()) <= 1e-5 * span, name

"""Small models of transformers with random weights, and ragged inputs for them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GemmaConfig,
    GemmaForCausalLM,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
)

VOCABULARY, IMAGE = 64, 63
_TOWER = {"intermediate_size": 40, "num_hidden_layers": 2}
_VISION = {**_TOWER, "hidden_size": 32, "num_attention_heads": 2, "patch_size": 4}
_TEXT = {**_TOWER, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 50, "max_position_embeddings": 9}
_TEXT |= {"projection_size": 32, "bos_token_id": None, "eos_token_id": 1}
_GEMMA = {**_TOWER, "hidden_size": 32, "head_dim": 24, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
_GEMMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "query_pre_attn_scalar": 20}
_GEMMA |= {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
_WINDOWS = {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]}


class Case(NamedTuple):
    """A model, what to call it with, and the part of its outputs that counts."""

    model: PreTrainedModel
    inputs: dict[str, Any]
    outputs: Callable[[Any], list[torch.Tensor]]


def _bold(model: PreTrainedModel) -> PreTrainedModel:
    """The weights of transformers' initialisation are so small that attention hardly shows."""
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=p.shape[-1] ** -0.5 if p.dim() > 1 else 0.2)
    return model.eval()


def _ids(*shape: int) -> torch.Tensor:
    return torch.randint(2, 50, shape)


def siglip() -> Case:
    """A text of 9 tokens and one of 5 with its padding masked, whose last, masked token is the one that is pooled."""
    model = SiglipModel(SiglipConfig(vision_config={**_VISION, "image_size": 12}, text_config=_TEXT))
    inputs = {
        "input_ids": _ids(2, 9),
        "attention_mask": torch.tensor([[1] * 9, [1] * 5 + [0] * 4]),
        "pixel_values": torch.randn(3, 3, 12, 12),
    }
    return Case(_bold(model), inputs, lambda out: [out.logits_per_image, out.text_embeds, out.image_embeds])


def siglip2() -> Case:
    """Three pictures of 20, 6 and 12 patches, padded to 20."""
    model = Siglip2Model(Siglip2Config(vision_config={**_VISION, "num_patches": 16}, text_config=_TEXT))
    sizes = torch.tensor([[4, 5], [2, 3], [6, 2]])
    valid = torch.arange(20) < sizes.prod(1, keepdim=True)
    inputs = {
        "input_ids": _ids(3, 9),
        "pixel_values": torch.randn(3, 20, 48),
        "pixel_attention_mask": valid.long(),
        "spatial_shapes": sizes,
    }

    def outputs(out: Any) -> list[torch.Tensor]:
        return [out.logits_per_image, out.image_embeds, out.vision_model_output.last_hidden_state[valid]]

    return Case(_bold(model), inputs, outputs)


def _language(model: PreTrainedModel, attention_mask: list[list[int]], **inputs: Any) -> Case:
    mask = torch.tensor(attention_mask)
    ids = inputs.pop("input_ids", _ids(*mask.shape))
    inputs = {"input_ids": ids, "attention_mask": mask, **inputs}
    return Case(_bold(model), inputs, lambda out: [out.logits[mask.bool()]])


def gemma() -> Case:
    """Causal, padding on the left."""
    return _language(GemmaForCausalLM(GemmaConfig(**_GEMMA)), [[1] * 10, [0] * 4 + [1] * 6])


def gemma2() -> Case:
    """Softcap, a window of 3 in every other layer, padding on the right."""
    c = Gemma2Config(**_GEMMA, **_WINDOWS, attn_logit_softcapping=2.0)
    return _language(Gemma2ForCausalLM(c), [[1] * 7 + [0] * 3, [1] * 10])


def gemma3() -> Case:
    """Two pictures of 4 tokens in one text, one in the other, longer than the window of 3; padding on the left."""
    c = Gemma3Config(
        text_config={**_GEMMA, **_WINDOWS, "sliding_window_pattern": 2},
        vision_config={**_VISION, "image_size": 16},
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=1,
        eoi_token_index=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    image, text = [IMAGE] * 4, [5, 7, 9]
    ids = torch.tensor([text + image + [11] + image + text, [0] * 4 + text + image + [4, 6, 8, 10]])
    return _language(
        Gemma3ForConditionalGeneration(c),
        (ids != 0).long().tolist(),
        input_ids=ids,
        token_type_ids=(ids == IMAGE).long(),
        pixel_values=torch.randn(3, 3, 16, 16),
    )


def paligemma(version: int = 1) -> Case:
    """A picture of 9 tokens and a prompt that see each other, then an answer; padding on the right."""
    text = {**_GEMMA, "model_type": "gemma"}
    if version == 2:
        text = {**_GEMMA, **_WINDOWS, "model_type": "gemma2", "attn_logit_softcapping": 2.0}
    c = PaliGemmaConfig(
        text_config=text,
        vision_config={**_VISION, "image_size": 12, "model_type": "siglip_vision_model", "projection_dim": 32},
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    image = [IMAGE] * 9
    ids = torch.tensor([[*image, 3, 4, 5, 6, 7, 8], [*image, 9, 10, 11, 0, 0, 0]])
    return _language(
        PaliGemmaForConditionalGeneration(c),
        (ids != 0).long().tolist(),
        input_ids=ids,
        token_type_ids=torch.tensor([[0] * 12 + [1] * 3, [0] * 10 + [1] * 2 + [0] * 3]),
        pixel_values=torch.randn(2, 3, 12, 12),
    )


def paligemma2() -> Case:
    """The same in front of Gemma 2: prefixes, windows and softcap."""
    return paligemma(2)


CASES = (siglip, siglip2, gemma, gemma2, gemma3, paligemma, paligemma2)
LANGUAGE = CASES[2:]

"""Small Gemmas with everything in them: windows shorter than the texts, fewer key heads, odd sizes, effective caps."""

from typing import Any

import torch
from peers import load, randomize

from vlkern.models import gemma_files
from vlkern.models.gemma import Gemma, GemmaConfig

_COMMON: dict[str, Any] = {"vocabulary": 83, "context": 64}
CONFIGS = {
    "gemma1": GemmaConfig(40, 2, 4, 1, 24, 56, 24, version=1, **_COMMON),
    "gemma1_mha": GemmaConfig(42, 1, 3, 3, 16, 33, 16, version=1, **_COMMON),
    "gemma2": GemmaConfig(
        36, 4, 6, 2, 16, 50, 10, version=2, pattern="LG", window=5, attention_softcap=1.5, final_softcap=3.0, **_COMMON
    ),
    "gemma3": GemmaConfig(
        30, 5, 6, 3, 8, 45, 12, version=3, pattern="LLG", window=4, rope_base=1e6, rope_factor=8.0, **_COMMON
    ),
}
LENGTHS = (13, 4, 9)


def pair(config: GemmaConfig) -> tuple[Gemma, Any]:
    """This library's model and transformers', with the same random parameters."""
    transformers = load("transformers")
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**gemma_files.to_json(config, torch.float32)),
        attn_implementation="eager",  # the others have no softcap
    )
    randomize(theirs)
    ours = Gemma(config).eval()
    state = {name: p for name, p in theirs.state_dict().items() if name != "lm_head.weight"}
    ours.load_state_dict(state)  # strict: exactly their names and shapes
    return ours, theirs


def rows(config: GemmaConfig, lengths: tuple[int, ...] = LENGTHS) -> list[torch.Tensor]:
    """Texts of random tokens."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(config.vocabulary, (length,), generator=generator) for length in lengths]


def starts(lengths: Any) -> torch.Tensor:
    """cu_seqlens of rows of these lengths."""
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)

"""Greedy generation token for token as transformers generates, from one ragged batch."""

import gemmas
import pytest
import torch
from multimodal_peers import GEMMA3, PALIGEMMA
from multimodal_peers import pair as pair_that_sees

from vlkern.data import Prompt
from vlkern.generation import generate

STEPS = 12


def by_transformers(model, ids, **more):
    """The tokens behind one row."""
    settings = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        return model.generate(torch.tensor([ids]), **settings, **more)[0, len(ids) :].tolist()


@pytest.mark.parametrize("name", ["gemma1", "gemma2", "gemma3"])
def test_gemma(name):
    ours, theirs = gemmas.pair(gemmas.CONFIGS[name])
    prompts = [row.tolist() for row in gemmas.rows(ours.config)]
    found = generate(ours, prompts, max_new_tokens=STEPS, prefill_chunk=8)
    assert [list(answer.tokens) for answer in found] == [by_transformers(theirs, row) for row in prompts]


@pytest.mark.parametrize("config", [*PALIGEMMA.values(), GEMMA3], ids=[*PALIGEMMA, "gemma3"])
def test_models_that_see(config):
    ours, theirs = pair_that_sees(config)
    generator = torch.Generator().manual_seed(3)
    image = [config.image_token] * config.image_tokens
    if config is GEMMA3:
        image = [config.start_of_image, *image, config.end_of_image]
    prompts, expected = [], []
    for count in (5, 2):
        ids = [2, *image, *torch.randint(3, 50, (count,), generator=generator).tolist()]
        pixels = torch.randn(1, 3, *config.vision.image_size, generator=generator)
        types = torch.tensor([[int(i == config.image_token) for i in ids]])
        if config is not GEMMA3:
            types = torch.zeros_like(types)
        prompts.append(Prompt(tuple(ids), pixels, len(ids)))
        allowed = {"suppress_tokens": list(range(config.sampled_vocabulary, config.language.vocabulary))}
        expected.append(by_transformers(theirs, ids, pixel_values=pixels, token_type_ids=types, **allowed))
    found = generate(ours, prompts, max_new_tokens=STEPS)
    assert [list(answer.tokens) for answer in found] == expected

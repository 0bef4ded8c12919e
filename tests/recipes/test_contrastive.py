import dataclasses

import pytest
import torch

from vlkern.models.siglip import Siglip, SiglipConfig, TextConfig, VisionConfig
from vlkern.recipes import contrastive
from vlkern.recipes.contrastive import Recipe

CONFIG = SiglipConfig(VisionConfig(32, 1, 2, 64, (16, 16), 8), TextConfig(32, 1, 2, 64, 50, 6))


def make(recipe):
    torch.manual_seed(0)
    model = Siglip(CONFIG)
    return model, contrastive.optimizer(model, recipe)


def test_every_parameter_is_in_one_group():
    recipe = Recipe(batch=8, weight_decay=5e-4, scalar_rate=10)
    model, optimizer = make(recipe)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [{names[id(p)] for p in group["params"]} for group in optimizer.param_groups]
    assert sum(map(len, groups)) == len(set.union(*groups)) == len(names)
    decay, rest, scalars = groups
    assert scalars == {"logit_scale", "logit_bias"}
    assert "vision_model.head.attention.in_proj_weight" in decay
    assert not any("embedding" in name or name.endswith("bias") or "norm" in name for name in decay)
    assert "text_model.embeddings.token_embedding.weight" in rest
    # PyTorch multiplies with the rate, so at the peak a step takes away 5e-4 of a matrix.
    assert [group["weight_decay"] for group in optimizer.param_groups] == pytest.approx([0.5, 0.0, 0.0])


@pytest.mark.parametrize("autocast", [False, True])
def test_steps_learn_a_fixed_batch(autocast):
    recipe = Recipe(batch=8, rate=3e-3, scalar_rate=10)
    model, optimizer = make(recipe)
    pixels = torch.rand(8, 3, 16, 16) * 2 - 1
    ids = torch.randint(50, (8, 6))
    losses = [
        contrastive.step(model, optimizer, recipe, recipe.rate, pixels, ids, autocast=autocast) for _ in range(40)
    ]
    assert losses[0] > 9
    assert losses[-1] < 1
    assert [group["lr"] for group in optimizer.param_groups] == [3e-3, 3e-3, 3e-2]


def test_rates_fall_with_the_distance_from_the_loss():
    """A block below another has `layer_decay` times its rate; the decay of matrices does not follow."""
    recipe = Recipe(batch=8, layer_decay=0.5, scalar_rate=3)
    model = Siglip(dataclasses.replace(CONFIG, vision=dataclasses.replace(CONFIG.vision, depth=2)))
    names = {id(p): name for name, p in model.named_parameters()}
    groups = contrastive.optimizer(model, recipe).param_groups
    multiple = {names[id(p)]: group["multiple"] for group in groups for p in group["params"]}
    assert multiple.keys() == set(names.values())
    tower = "vision_model."
    assert multiple[tower + "head.probe"] == multiple[tower + "post_layernorm.weight"] == 1
    assert multiple[tower + "encoder.layers.1.mlp.fc1.weight"] == 0.5
    assert multiple[tower + "encoder.layers.0.layer_norm1.bias"] == 0.25
    assert multiple[tower + "embeddings.position_embedding.weight"] == 0.125
    assert multiple["text_model.embeddings.token_embedding.weight"] == 0.25
    assert multiple["logit_scale"] == multiple["logit_bias"] == 3
    shares = {group["multiple"] * recipe.rate * group["weight_decay"] for group in groups if group["weight_decay"]}
    assert max(shares) == pytest.approx(min(shares)) == pytest.approx(recipe.weight_decay)


def test_frozen_parameters_are_left_out():
    torch.manual_seed(0)
    model = Siglip(CONFIG)
    model.vision_model.requires_grad_(False)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = contrastive.optimizer(model, Recipe(batch=8)).param_groups
    trained = {names[id(p)] for group in groups for p in group["params"]}
    assert trained == {name for name in names.values() if not name.startswith("vision_model.")}

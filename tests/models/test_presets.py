"""Every preset on the meta device: shapes, and the exact number of parameters of transformers' model."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from peers import load, transformers_config

from vlkern import models
from vlkern.models import naflex
from vlkern.models.siglip import PRESETS

RELEASED = {
    *(f"siglip-base-patch16-{side}" for side in (224, 256, 384, 512)),
    *(f"siglip-large-patch16-{side}" for side in (256, 384)),
    *(f"siglip-so400m-patch14-{side}" for side in (224, 384)),
    "siglip-base-patch16-256-multilingual",
    "siglip-so400m-patch16-256-i18n",
    "siglip2-base-patch32-256",
    *(f"siglip2-base-patch16-{side}" for side in (224, 256, 384, 512)),
    *(f"siglip2-large-patch16-{side}" for side in (256, 384, 512)),
    *(f"siglip2-so400m-patch14-{side}" for side in (224, 384)),
    *(f"siglip2-so400m-patch16-{side}" for side in (256, 384, 512)),
    *(f"siglip2-giant-opt-patch16-{side}" for side in (256, 384)),
}
NAFLEX = {"siglip2-base-patch16-naflex", "siglip2-so400m-patch16-naflex"}


def _count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_all_released_names():
    small = {"siglip-tiny", "siglip-small", "naflex-tiny", "naflex-small"}
    assert set(models.list_models()) >= RELEASED | NAFLEX | small
    assert {name for name in models.list_models() if name.startswith("siglip")} <= RELEASED | NAFLEX | small
    assert not [name for name, times in Counter(models.list_models()).items() if times > 1]


@pytest.mark.parametrize("name", [*PRESETS, *naflex.PRESETS])
def test_transformers_has_the_same_parameters(name):
    """With two layers a tower: the others are like them."""
    transformers = load("transformers")
    config = (PRESETS | naflex.PRESETS)[name]
    config = replace(config, vision=replace(config.vision, depth=2), text=replace(config.text, depth=2))
    with torch.device("meta"):
        ours = (models.siglip.Siglip if name in PRESETS else naflex.Naflex)(config)
        theirs = (transformers.SiglipModel if name in PRESETS else transformers.Siglip2Model)(
            transformers_config(config)
        )
    shapes = {key: tuple(p.shape) for key, p in ours.named_parameters()}
    assert shapes == {key: tuple(p.shape) for key, p in theirs.named_parameters()}
    assert _count(ours) == _count(theirs)


@pytest.mark.parametrize("name", ["siglip-tiny", "siglip2-giant-opt-patch16-256"])
def test_forward_on_the_meta_device(name):
    with torch.device("meta"):
        model = models.create(name)
        c = model.config
        image, text = model(torch.empty(2, 3, *c.vision.image_size), torch.empty(2, c.text.length, dtype=torch.long))
    assert image.shape == text.shape == (2, c.vision.width)


@pytest.mark.parametrize(
    ("name", "image", "text"),
    [
        ("siglip2-base-patch16-256", 92.9, 282),
        ("siglip2-base-patch32-256", 94.6, 282),
        ("siglip2-large-patch16-256", 316, 566),
        ("siglip2-so400m-patch14-224", 428, 708),
        ("siglip2-giant-opt-patch16-256", 1163, 708),
        ("siglip2-base-patch16-naflex", 92.9, 282),
        ("siglip2-so400m-patch16-naflex", 428, 708),
    ],
)
def test_the_papers_parameter_counts(name, image, text):
    """In millions, as far as the digits go."""
    with torch.device("meta"):
        model = models.create(name)
    assert _count(model.vision_model) / 1e6 == pytest.approx(image, rel=2e-3)
    assert _count(model.text_model) / 1e6 == pytest.approx(text, rel=2e-3)


def test_sizes_that_names_do_not_tell():
    assert PRESETS["siglip-so400m-patch14-224"].text.length == 16
    assert PRESETS["siglip-so400m-patch14-384"].text.length == 64
    assert PRESETS["siglip-so400m-patch14-384"].vision.patches == 27 * 27
    vocabularies = {name: PRESETS[name].text.vocabulary for name in RELEASED}
    for name in ("siglip-base-patch16-256-multilingual", "siglip-so400m-patch16-256-i18n"):
        assert vocabularies.pop(name) == 250_000
    assert {v for name, v in vocabularies.items() if name.startswith("siglip-")} == {32_000}
    assert {v for name, v in vocabularies.items() if name.startswith("siglip2-")} == {256_000}

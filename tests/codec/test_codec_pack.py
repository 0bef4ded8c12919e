"""Small folders of codecs: the transforms in float16 and the integers."""

import pytest
import torch

from vlkern import codec, models
from vlkern.codec.integer import Latents, convert
from vlkern.codec.pack import pack
from vlkern.errors import UserError


@pytest.fixture
def trained(tmp_path):
    """A folder of a model with its integers, and the model."""
    torch.manual_seed(0)
    model = models.create("m2t-tiny")
    folder = tmp_path / "model"
    models.save_pretrained(model, folder)
    with torch.no_grad():
        tokens, known = model.tiles(model.analysis(torch.rand(4, 3, 64, 64) * 2 - 1, level=2).round())
    convert(model, [Latents(tokens, known, level=2)]).save(folder)
    return folder, model


def test_a_packed_codec_codes_what_it_decodes(trained, tmp_path):
    folder, model = trained
    pack(folder, tmp_path / "small")
    small, whole = codec.load(tmp_path / "small"), codec.load(folder)
    assert small.exactness == ("integer",) and whole.exactness == ("float", "integer")
    picture = (torch.rand(3, 40, 70) * 255).to(torch.uint8)
    data = codec.compress(picture, quality=4, codec=small)
    assert codec.decompress(data, codec=small).size == (70, 40)
    with pytest.raises(UserError, match="made with the model"):
        codec.decompress(data, codec=whole)  # whose transforms are not rounded
    half = dict(small.model.named_parameters())
    for name, parameter in model.named_parameters():
        if not name.startswith("entropy."):
            assert torch.equal(half.pop(name), parameter.half().float())
    assert not half
    with pytest.raises(ValueError, match="exact must be integer"):
        codec.compress(picture, exact="float", codec=small)


def test_only_codecs_with_integers_are_packed(trained, tmp_path):
    folder, _ = trained
    (folder / "integer.safetensors").unlink()
    with pytest.raises(UserError, match=r"expected integer\.safetensors"):
        pack(folder, tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_a_damaged_packed_folder_is_refused(trained, tmp_path):
    folder, _ = trained
    small = tmp_path / "small"
    pack(folder, small)
    (small / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not readable"):
        codec.load(small)
    pack(folder, small)
    tensors = small / "transforms.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"transforms\.safetensors"):
        codec.load(small)

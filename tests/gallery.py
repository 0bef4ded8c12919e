"""A tiny model with its tokenizer in a folder, and pictures to ask it about, for the tests of evaluation and search."""

import io
import json
from pathlib import Path

import numpy as np
import shards
import torch
from PIL import Image

from vlkern import data, models
from vlkern.models.siglip import Siglip, SiglipConfig, TextConfig, VisionConfig

CONFIG = SiglipConfig(
    VisionConfig(width=32, depth=1, heads=2, mlp=64, image_size=(16, 16), patch=8),
    TextConfig(width=32, depth=1, heads=2, mlp=64, vocabulary=258, length=24),
)


def model(seed: int = 0) -> Siglip:
    torch.manual_seed(seed)
    return Siglip(CONFIG).eval()


def save(folder: Path, seed: int = 0) -> Path:
    models.save_pretrained(model(seed), folder)
    data.ByteTokenizer(CONFIG.text.length).save(folder)
    return folder


def noise(seed: int, size: int = 16) -> bytes:
    """A picture unlike any other, stored without loss at the model's size."""
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def records(count: int) -> list[dict]:
    """One to three captions; names in `de`, for every second one also in `mi`; a category of three, `sort` for most."""
    return [
        {
            "captions": [f"caption {i} {j}" for j in range(1 + i % 3)],
            "names": {"de": f"Name {i}"} | ({"mi": [f"ingoa {i}", f"kupu {i}"]} if i % 2 else {}),
            "category": ["red", "green", "blue"][i % 3],
        }
        | ({"sort": ["a", "b"] if i % 5 == 0 else "b"} if i else {})
        for i in range(count)
    ]


def shard(path: Path, count: int = 12, broken: tuple[int, ...] = ()) -> Path:
    members = {}
    for i, record in enumerate(records(count)):
        members[f"{i:03}.png"] = b"nothing" if i in broken else noise(i)
        members[f"{i:03}.json"] = json.dumps(record).encode()
    return shards.write(path, members)


def folder(path: Path, count: int = 12) -> Path:
    """Pictures in red/, green/ and blue/; hidden ones and other files beside them."""
    for i in range(count):
        place = path / records(count)[i]["category"] / f"{i:03}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(noise(i))
    (path / ".thumbnails").mkdir()
    (path / ".thumbnails" / "000.png").write_bytes(noise(0))
    (path / "red" / "notes.txt").write_text("not a picture")
    return path


@torch.no_grad()
def vectors(model: Siglip, numbers: list[int]) -> torch.Tensor:
    """Embeddings of these pictures, one by one, without the code under test."""
    pixels = [np.array(Image.open(io.BytesIO(noise(i)))).transpose(2, 0, 1) for i in numbers]
    return torch.cat([model.encode_image(torch.from_numpy(p)[None].float() / 127.5 - 1) for p in pixels])


@torch.no_grad()
def words(model: Siglip, texts: list[str]) -> torch.Tensor:
    """Embeddings of these texts, one by one."""
    tokenizer = data.ByteTokenizer(CONFIG.text.length)
    return torch.cat([model.encode_text(tokenizer([text])) for text in texts])

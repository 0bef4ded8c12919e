"""Image-text pairs: WebDataset shards, pictures, batches, tokens, and the small set that comes with the package."""

from pathlib import Path

from vlkern.data.batches import batches
from vlkern.data.classes import Classes
from vlkern.data.cropping import RandomCrop
from vlkern.data.images import decode_image, to_unit
from vlkern.data.naflex import NaflexSize, naflex_batches
from vlkern.data.native import NavitSize, Views, native_batches
from vlkern.data.pairs import DataError, Pair, Pairs, load_pairs, read_pairs
from vlkern.data.patches import PackedImages, PackedTexts, pack_images, pack_texts
from vlkern.data.prefixed import Layout, Packed, pack_examples, prefixed_batches
from vlkern.data.prompts import Prompt, chat_prompt, chat_text, crops, gemma3_prompt, paligemma_prompt, pixels_of
from vlkern.data.resolution import Resolutions
from vlkern.data.shards import PairShards, find_shards
from vlkern.data.slots import Sequences, sequences, texts_of
from vlkern.data.tasks import Example, Tasks
from vlkern.data.text import ByteTokenizer, learn_merges
from vlkern.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from vlkern.data.vocabulary import BytePieces, Vocabulary, load_vocabulary

__all__ = [
    "BytePieces",
    "ByteTokenizer",
    "Classes",
    "DataError",
    "Example",
    "Layout",
    "NaflexSize",
    "NavitSize",
    "Packed",
    "PackedImages",
    "PackedTexts",
    "Pair",
    "PairShards",
    "Pairs",
    "Prompt",
    "RandomCrop",
    "Resolutions",
    "Sequences",
    "Tasks",
    "Tokenizer",
    "Views",
    "Vocabulary",
    "batches",
    "chat_prompt",
    "chat_text",
    "check_vocabulary",
    "clipart_mini",
    "crops",
    "decode_image",
    "find_shards",
    "gemma3_prompt",
    "learn_merges",
    "load_pairs",
    "load_tokenizer",
    "load_vocabulary",
    "naflex_batches",
    "native_batches",
    "pack_examples",
    "pack_images",
    "pack_texts",
    "paligemma_prompt",
    "photos",
    "pixels_of",
    "prefixed_batches",
    "read_pairs",
    "sequences",
    "texts_of",
    "to_unit",
]


def _shipped(package_name: str, folder: str) -> Path:
    """A folder of data that comes with the package: beside it in a wheel, in data/ in a checkout."""
    package = Path(__file__).parents[1]
    places = [package / package_name, package.parents[1] / "data" / folder]
    for place in places:
        if (place / "train.tar").is_file():
            return place
    raise DataError(f"{folder} must lie in {places[0]} or {places[1]}, and is in neither")


def clipart_mini() -> Path:
    """The folder with train.tar (2000 pictures) and test.tar (400): public-domain drawings with English captions.

    In a wheel it lies inside the package, in a checkout in data/clipart-mini.

    Raises:
        DataError: neither is there.
    """
    return _shipped("clipart_mini", "clipart-mini")


def photos() -> Path:
    """The folder with eval/ (4 photographs, lossless) and train.tar (166 crops of others): public domain or CC0.

    In a wheel it lies inside the package, in a checkout in data/photos.

    Raises:
        DataError: neither is there.
    """
    return _shipped("photos", "photos")

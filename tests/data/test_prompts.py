"""Prompts with pictures: tokens and pixels are those of transformers' processors, with a small tokenizer."""

import io
import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest
import tokenizers
import torch
from PIL import Image
from tokenizers import AddedToken, decoders, models, normalizers, processors, trainers

from vlkern.data import chat_prompt, chat_text, crops, gemma3_prompt, load_vocabulary, paligemma_prompt
from vlkern.errors import UserError

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
CHAT = ("<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>")
NEWLINES = ["\n" * n for n in (1, 2, 3, 4)]
PLACES = [f"<loc{i:04d}>" for i in range(1024)] + [f"<seg{i:03d}>" for i in range(128)]


@dataclass(frozen=True)
class Size:
    image_size: tuple[int, int]


@dataclass(frozen=True)
class Rows:
    vocabulary: int


@dataclass(frozen=True)
class Model:
    """What prompts need to know."""

    vision: Size
    language: Rows
    image_token: int
    image_tokens: int
    sampled_vocabulary: int


def like_gemma(extra, special_extra, *, start):
    """Byte pairs with blanks as they are, newlines as pieces of their own, and special pieces."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Replace("▁", " ")
    texts = ["caption en what is this? answer en a cat and a dog user model detect segment hello"] * 3
    trainer = trainers.BpeTrainer(vocab_size=160, special_tokens=list(SPECIAL), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(n, normalized=False) for n in (*NEWLINES, *extra)])
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in special_extra])
    if start:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair=None, special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
        )
    return tokenizer


def vocabulary_of(tokenizer, folder):
    tokenizer.save(str(folder / "tokenizer.json"))
    return load_vocabulary(folder)


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory):
    tokenizer = like_gemma((), CHAT, start=True)
    vocabulary = vocabulary_of(tokenizer, tmp_path_factory.mktemp("gemma3"))
    image = tokenizer.token_to_id(CHAT[-1])
    assert image == vocabulary.size - 1
    return Model(Size((36, 36)), Rows(image + 64), image, 9, image), vocabulary, tokenizer


@pytest.fixture(scope="module")
def paligemma(tmp_path_factory):
    tokenizer = like_gemma(PLACES, ("<image>",), start=False)
    vocabulary = vocabulary_of(tokenizer, tmp_path_factory.mktemp("paligemma"))
    image = tokenizer.token_to_id("<image>")
    return Model(Size((21, 21)), Rows(image + 64), image, 9, image), vocabulary, tokenizer


def picture(height, width, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def text_of(prompt, vocabulary, tokenizer):
    return [tokenizer.id_to_token(i) for i in prompt.ids]


def test_paligemma_layout(paligemma):
    model, vocabulary, tokenizer = paligemma
    prompt = paligemma_prompt(model, vocabulary, "caption en", [picture(9, 30)], suffix="<loc0003> a cat")
    pieces = text_of(prompt, vocabulary, tokenizer)
    assert pieces[:10] == ["<image>"] * 9 + ["<bos>"]
    assert pieces[prompt.prefix - 1] == "\n"
    assert "".join(pieces[10 : prompt.prefix - 1]).replace("▁", " ") == "caption en"
    assert pieces[prompt.prefix] == "<loc0003>"
    assert pieces[-1] == "<eos>"
    assert prompt.pixels.shape == (1, 3, 21, 21)
    assert prompt.pixels.dtype == torch.float32
    assert -1 <= float(prompt.pixels.min()) <= float(prompt.pixels.max()) <= 1


def test_paligemma_newline_never_merges(paligemma):
    """Behind a text that ends with one, too."""
    model, vocabulary, tokenizer = paligemma
    prompt = paligemma_prompt(model, vocabulary, "a\n", [picture(9, 9)])
    assert text_of(prompt, vocabulary, tokenizer)[-3:] == ["a", "\n", "\n"]
    assert prompt.prefix == len(prompt.ids)


@pytest.mark.parametrize("count", [1, 2])
def test_paligemma_is_transformers(paligemma, count):
    transformers = pytest.importorskip("transformers")
    siglip = pytest.importorskip("transformers.models.siglip.image_processing_pil_siglip")
    model, vocabulary, tokenizer = paligemma
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(tokenizer.to_str()),
        bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    image_processor = siglip.SiglipImageProcessorPil(
        size={"height": 21, "width": 21}, resample=Image.Resampling.BILINEAR
    )
    image_processor.image_seq_length = 9
    processor = transformers.PaliGemmaProcessor(image_processor, fast)
    pictures = [picture(30, 50, seed) for seed in range(count)]
    theirs = processor(
        text="<image>" * count + "detect cat ; dog",
        images=pictures,
        suffix="<loc0100><seg003> cat",
        return_tensors="pt",
    )
    ours = paligemma_prompt(model, vocabulary, "detect cat ; dog", pictures, suffix="<loc0100><seg003> cat")
    assert list(ours.ids) == theirs["input_ids"][0].tolist()
    assert ours.prefix == int((theirs["token_type_ids"] == 0).sum())
    torch.testing.assert_close(ours.pixels, theirs["pixel_values"], rtol=0, atol=1e-6)
    assert (
        ours.ids
        == paligemma_prompt(
            model, vocabulary, "<image>" * count + "detect cat ; dog", pictures, suffix="<loc0100><seg003> cat"
        ).ids
    )


def processor_of(gemma3, pan_and_scan):
    transformers = pytest.importorskip("transformers")
    pil = pytest.importorskip("transformers.models.gemma3.image_processing_pil_gemma3")
    _, _, tokenizer = gemma3
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(tokenizer.to_str()),
        bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>",
        extra_special_tokens={"boi_token": CHAT[2], "eoi_token": CHAT[3], "image_token": CHAT[4]},
    )  # fmt: skip
    image_processor = pil.Gemma3ImageProcessorPil(
        size={"height": 36, "width": 36}, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_pan_and_scan=pan_and_scan
    )
    return transformers.Gemma3Processor(image_processor, fast, image_seq_length=9), pan_and_scan


@pytest.mark.parametrize("pan_and_scan", [False, True])
@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("hello\n", []),
        ("<start_of_image>what is this?", [(20, 40)]),
        ("a <start_of_image>\n\nand <start_of_image> model", [(300, 700), (513, 256)]),
        ("<start_of_image><start_of_image>", [(512, 2048), (256, 256)]),
        (chat_text([("user", "<start_of_image>what is\n"), ("model", "a cat"), ("user", "and a dog")]), [(600, 500)]),
    ],
)
def test_gemma3_is_transformers(gemma3, text, sizes, pan_and_scan):
    model, vocabulary, _ = gemma3
    processor, flag = processor_of(gemma3, pan_and_scan)
    pictures = [picture(*size, seed) for seed, size in enumerate(sizes)]
    options = {"do_pan_and_scan": flag} if pictures else {}
    theirs = processor(text=text, images=[pictures] if pictures else None, return_tensors="pt", **options)
    ours = gemma3_prompt(model, vocabulary, text, pictures, pan_and_scan=pan_and_scan)
    assert list(ours.ids) == theirs["input_ids"][0].tolist()
    assert ours.prefix == len(ours.ids)
    if pictures:
        torch.testing.assert_close(ours.pixels, theirs["pixel_values"], rtol=0, atol=1e-6)
        places = (torch.tensor(ours.ids) == model.image_token).long()
        assert torch.equal(places, (theirs["token_type_ids"][0] == 1).long())
    else:
        assert ours.pixels is None


def test_pan_and_scan_is_transformers():
    """Which parts of a picture, for many shapes around every threshold."""
    pil = pytest.importorskip("transformers.models.gemma3.image_processing_pil_gemma3")
    processor = pil.Gemma3ImageProcessorPil()
    sides = (1, 100, 255, 256, 257, 307, 308, 400, 511, 512, 513, 639, 640, 641, 896, 897, 1023, 1024, 1025, 2000, 2600)
    cut = 0
    for height, width in itertools.product(sides, sides):
        # One channel, whose entries say where they were.
        image = np.arange(height * width, dtype=np.int32).reshape(1, height, width)
        parts = processor.pan_and_scan(image, 256, 4, 1.2)
        theirs = []
        for part in parts:
            (top, left), (bottom, right) = (divmod(int(corner), width) for corner in (part[0, 0, 0], part[0, -1, -1]))
            theirs.append((top, left, bottom + 1, right + 1))
        assert crops(height, width) == theirs, (height, width)
        cut += bool(theirs)
    assert cut > 50


def test_crops():
    assert crops(896, 896) == []
    assert crops(1000, 3000) == [(0, 0, 1000, 1000), (0, 1000, 1000, 2000), (0, 2000, 1000, 3000)]
    assert crops(1025, 300) == [(0, 0, 342, 300), (342, 0, 684, 300), (684, 0, 1025, 300)]
    assert crops(10, 10_000, smallest=1, most=3) == [(0, 0, 10, 3334), (0, 3334, 10, 6668), (0, 6668, 10, 10_000)]


def test_chat_text():
    turns = [("user", " Hello "), ("model", "Hi\n"), ("user", "and you?")]
    assert chat_text(turns, system="Be brief.") == (
        "<start_of_turn>user\nBe brief.\n\nHello<end_of_turn>\n<start_of_turn>model\nHi<end_of_turn>\n"
        "<start_of_turn>user\nand you?<end_of_turn>\n<start_of_turn>model\n"
    )
    for wrong in ([("model", "a")], [("user", "a"), ("user", "b")], [("user", "a"), ("model", "b")], []):
        with pytest.raises(UserError, match="turns must"):
            chat_text(wrong)


def test_chat_prompt(gemma3):
    """Pictures without a place come first; turns are marked by tokens, even if the tokenizer takes these for text."""
    model, vocabulary, tokenizer = gemma3
    turns = [("user", "what is this?")]
    prompt = chat_prompt(model, vocabulary, turns, [picture(9, 9)])
    same = chat_prompt(model, vocabulary, [("user", "<start_of_image>what is this?")], [picture(9, 9)])
    assert prompt.ids == same.ids
    pieces = text_of(prompt, vocabulary, tokenizer)
    assert pieces[:2] == ["<bos>", "<start_of_turn>"]
    at = pieces.index("<start_of_image>")
    assert pieces[at - 1] == "\n\n\n"  # that of the turn and the two of the image
    assert pieces[at : at + 12] == ["<start_of_image>"] + ["<image_soft_token>"] * 9 + ["<end_of_image>", "\n\n"]
    assert pieces[-1] == "\n"
    assert pieces.count("<start_of_turn>") == 2
    assert pieces.count("<end_of_turn>") == 1


def encoded(image, kind="PNG"):
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def test_pictures_may_be_files(paligemma):
    model, vocabulary, _ = paligemma
    image = picture(40, 30)
    by_bytes = paligemma_prompt(model, vocabulary, "caption en", [encoded(image)])
    assert torch.equal(by_bytes.pixels, paligemma_prompt(model, vocabulary, "caption en", [image]).pixels)
    clear = Image.new("RGBA", (5, 5))
    assert bool((paligemma_prompt(model, vocabulary, "", [clear]).pixels == 1).all())  # on white
    with pytest.raises(UserError, match="image 2: no readable picture"):
        paligemma_prompt(model, vocabulary, "", [image, b"no picture"])
    with pytest.raises(TypeError, match="image 1 must be a Pillow image or the contents of a file, got str"):
        paligemma_prompt(model, vocabulary, "", ["a.png"])


def test_image_counts(paligemma, gemma3):
    model, vocabulary, _ = paligemma
    two = [picture(9, 9)] * 2
    with pytest.raises(UserError, match="images must be as many as <image> in the prompt, 3, got 2"):
        paligemma_prompt(model, vocabulary, "<image> <image><image> a cat", two)
    with pytest.raises(UserError, match="<image> must stand at the beginning of the prompt"):
        paligemma_prompt(model, vocabulary, "<image> a <image>", two)
    with pytest.raises(UserError, match="must not contain the placeholder of images"):
        paligemma_prompt(model, vocabulary, "a", two, suffix="<image>")
    model, vocabulary, _ = gemma3
    with pytest.raises(UserError, match="images must be as many as <start_of_image> in the prompt, 1, got 2"):
        gemma3_prompt(model, vocabulary, "<start_of_image> a cat", two)
    with pytest.raises(UserError, match="in the prompt, 1, got 0"):
        gemma3_prompt(model, vocabulary, "<start_of_image> a cat")
    with pytest.raises(
        UserError, match=f"placeholder of images, token {model.image_token}, got 1 of them for 0 images"
    ):
        gemma3_prompt(model, vocabulary, "<image_soft_token> a cat")


def test_tokenizers_of_another_model(paligemma, gemma3):
    model, vocabulary, _ = paligemma
    for wrong in (
        replace(model, sampled_vocabulary=vocabulary.size + 1, language=Rows(vocabulary.size + 64)),
        replace(model, sampled_vocabulary=7, language=Rows(vocabulary.size - 1)),
    ):
        with pytest.raises(UserError, match=f"the tokenizer must have .* got {vocabulary.size}: take the tokenizer"):
            paligemma_prompt(wrong, vocabulary, "caption en")
    model, _, _ = gemma3
    plain = load_vocabulary("bytes")
    model = replace(model, sampled_vocabulary=plain.size, language=Rows(plain.size + 64), image_token=plain.size)
    with pytest.raises(UserError, match="the tokenizer must have <start_of_turn>, got one without"):
        chat_prompt(model, plain, [("user", "a")])
    assert gemma3_prompt(model, plain, "a").ids == (plain.start, *plain.encode("a"))

"""Tokens of language models: every text comes back from its tokens, and special pieces are what they should be."""

import io
import json

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, trainers

from vlkern.data import BytePieces, DataError, learn_merges, load_vocabulary

SENTENCES = ["a red car", "two red cars on a street", "Hello there", "the cat sat on the mat"] * 5
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
SHOWN = ["<loc0000>", "<loc0001>", "<seg007>"]
ODD = ["A Red-car", "  two   blanks ", "", "ÄÖ ß İ", "日本 🦊", "a\tb\nc", "<loc0001><seg007> red", "x<bos>y", "\udc80"]


def json_like_gemma(decoder=None):
    """Byte pairs over pieces with "▁" for a blank, all bytes, and added tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    tokenizer.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=360, special_tokens=[*SPECIAL, *bytes_], show_progress=False)
    )
    # The trainer made the bytes special; in the released files they are ordinary pieces.
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [entry for entry in content["added_tokens"] if not entry["content"].startswith("<0x")]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    tokenizer.add_tokens(SHOWN)
    tokenizer.decoder = decoder or decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def sentencepiece_like_gemma(**options):
    out = io.BytesIO()
    names = {"pad": 0, "eos": 1, "bos": 2, "unk": 3}
    ids = {f"{name}_id": i for name, i in names.items()} | {f"{name}_piece": f"<{name}>" for name in names}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=out, minloglevel=2, num_threads=1, vocab_size=330,
        model_type="bpe", byte_fallback=True, user_defined_symbols=SHOWN,
        **{"add_dummy_prefix": False, "remove_extra_whitespaces": False, "normalization_rule_name": "identity", **ids,
           **options},
    )  # fmt: skip
    return out.getvalue()


@pytest.fixture(scope="module", params=["json", "model"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "json":
        json_like_gemma().save(str(folder / "tokenizer.json"))
    else:
        (folder / "tokenizer.model").write_bytes(sentencepiece_like_gemma())
    return folder


def text_of(words, tokens):
    return b"".join(map(words.piece, tokens)).decode()


def test_files_like_gemma(folder, tmp_path):
    words = load_vocabulary(folder)
    assert (words.start, words.end, words.blank) == (2, 1, False)
    for text in ODD:
        tokens = words.encode(text)
        assert all(0 <= token < words.size for token in tokens)
        shown = text.encode("utf-8", "replace").decode()
        # A control piece in a text is itself in a tokenizer.json, and no text; to SentencePiece it is letters.
        expected = shown.replace("<bos>", "") if (folder / "tokenizer.json").exists() else shown
        assert text_of(words, tokens) == expected
    assert len(words.encode("".join(SHOWN))) == 3
    assert [words.token(name) for name in SHOWN] == words.encode("".join(SHOWN))
    assert words.token("<nothing>") is None
    assert [words.piece(i) for i in (0, 1, 2, words.size, words.size + 1000)] == [b""] * 5
    words.save(tmp_path)
    again = load_vocabulary(tmp_path)
    assert again.encode(ODD[0]) == words.encode(ODD[0]) and again.size == words.size


def test_tokenizer_json_says_what_tokenizers_says(folder):
    if not (folder / "tokenizer.json").exists():
        reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        decode, encode = reference.decode, reference.encode
    else:
        reference = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        decode, encode = reference.decode, lambda text: reference.encode(text, add_special_tokens=False).ids
    words = load_vocabulary(folder)
    for text in ODD[:-1]:
        tokens = words.encode(text)
        assert tokens == encode(text)
        assert text_of(words, tokens) == decode(tokens)


def test_a_blank_before_the_text(tmp_path):
    """As SentencePiece does unless it is told otherwise."""
    (tmp_path / "t.model").write_bytes(sentencepiece_like_gemma(add_dummy_prefix=True))
    words = load_vocabulary(tmp_path)
    assert words.blank and text_of(words, words.encode("red car")) == " red car"


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    text=st.text(max_size=20).filter(lambda t: not t.startswith("\n")),
    places=st.lists(st.integers(0, 1023), min_size=1, max_size=5),
)
def test_byte_pieces(text, places):
    words = BytePieces(learn_merges(SENTENCES, 20))
    text = text.lower()
    found = words.encode(text)
    assert text_of(words, found) == " " + text
    assert max(found, default=0) < words.size == 1283 + 20
    shown = "".join(f"<loc{place:04}>" for place in places)
    assert words.encode(shown + " red") == [words.token(f"<loc{p:04}>") for p in places] + words.encode("red")
    assert text_of(words, words.encode(shown)) == shown


def test_byte_pieces_are_kept(tmp_path):
    words = BytePieces(learn_merges(SENTENCES, 20))
    words.save(tmp_path)
    again = load_vocabulary(tmp_path)
    assert isinstance(again, BytePieces) and again.merges == words.merges
    assert words.encode("\n") == [3 + 10] and words.encode("Red") == words.encode("red")
    assert [words.piece(i) for i in range(3)] == [b""] * 3
    assert words.encode("<loc1024>") == BytePieces.encode(words, "<loc1024>") and words.token("<loc1024>") is None


def test_what_cannot_be_read(tmp_path):
    def fails(message, source=tmp_path):
        with pytest.raises(DataError, match=message):
            load_vocabulary(source)

    fails("no tokenizer there")
    fails("no such tokenizer", tmp_path / "nothing")
    (tmp_path / "tokenizer.txt").write_text("")
    fails("is called", tmp_path / "tokenizer.txt")
    (tmp_path / "tokenizer.json").write_text("{}")
    fails("tokenizer.json: not a readable tokenizer")
    json_like_gemma(decoders.ByteLevel()).save(str(tmp_path / "tokenizer.json"))
    fails("expected pieces of SentencePiece, as Gemma has, got bytes in GPT-2's code")
    tokenizers.Tokenizer(models.BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    fails("no end token")
    (tmp_path / "pieces.json").write_text('{"merges": [[1, 2]]}')
    fails("pieces.json: no merges")

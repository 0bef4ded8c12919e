"""Tokenizers from files: id for id what transformers gives, with small vocabularies trained here."""

import io
import itertools
import json
import os
import pickle
import subprocess
import sys

import pytest
import sentencepiece
import tokenizers
import torch
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from vlkern import data
from vlkern.data import ByteTokenizer, DataError, check_vocabulary, load_tokenizer
from vlkern.errors import UserError

ODD = [
    "A Red-car, FAST!",
    "",
    "  two   blanks ",
    "snake_case",
    "it's",
    "ÄÖ ß İ",
    "日本 🦊",
    "...",
    "a\tb\nc",
    "▁a▁b",
    "x " * 40,
]


@pytest.fixture(scope="module")
def captions():
    pairs = data.PairShards(data.clipart_mini() / "test.tar", 8)
    return list(itertools.chain(*map(pairs.captions_of, range(len(pairs)))))[:400]


def sentence_pieces(captions, **options):
    out = io.BytesIO()
    lower = iter([caption.lower() for caption in captions])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lower, model_writer=out, minloglevel=2, num_threads=1, **options
    )
    return out.getvalue()


def sentence_processor(path):
    return sentencepiece.SentencePieceProcessor(model_file=path)


SIGLIP1_CONFIG = {"tokenizer_class": "SiglipTokenizer", "eos_token": "</s>", "pad_token": {"content": "</s>"}}


@pytest.fixture(scope="module")
def siglip1(captions, tmp_path_factory):
    """Like c4_en: unigrams, <pad> 0, </s> 1, <unk> 2, no start token."""
    folder = tmp_path_factory.mktemp("siglip1")
    model = sentence_pieces(captions, vocab_size=400, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    (folder / "spiece.model").write_bytes(model)
    (folder / "tokenizer_config.json").write_text(json.dumps(SIGLIP1_CONFIG))
    return folder


@pytest.fixture(scope="module")
def gemma_model(captions, tmp_path_factory):
    """Like Gemma's tokenizer.model: byte pairs with all bytes, blanks as they are."""
    names = {"pad": 0, "eos": 1, "bos": 2, "unk": 3}
    options = {f"{name}_id": i for name, i in names.items()} | {f"{name}_piece": f"<{name}>" for name in names}
    model = sentence_pieces(
        captions, vocab_size=600, model_type="bpe", byte_fallback=True, add_dummy_prefix=False,
        remove_extra_whitespaces=False, normalization_rule_name="identity", **options,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("gemma") / "tokenizer.model"
    path.write_bytes(model)
    return path


@pytest.fixture(scope="module")
def gemma_json(captions, tmp_path_factory):
    """Like Gemma's tokenizer.json, with a start token and a padding that are not to be used."""
    made = tokenizers.Tokenizer(models.BPE(fuse_unk=True, unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{i:02X}>" for i in range(256))]
    lower = [caption.lower() for caption in captions]
    made.train_from_iterator(lower, trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False))
    made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    made.enable_padding(length=30)
    made.enable_truncation(20)
    path = tmp_path_factory.mktemp("json") / "tokenizer.json"
    made.save(str(path))
    return path


def test_siglip1_as_transformers(siglip1, captions):
    """Lower-case, no punctuation, padded with the end token, which stays when the text is cut.

    transformers cuts a text with a word in front and removes that word again, so that sums of log-probabilities are
    rounded differently: where two ways of cutting are equally probable, it may take the other one.
    """
    from transformers import SiglipTokenizer

    hugging, processor = (kind(str(siglip1 / "spiece.model")) for kind in (SiglipTokenizer, sentence_processor))
    texts, tied = [], 0
    for text in [*captions, *ODD]:
        ours = load_tokenizer(siglip1, 99)([text])[0].tolist()
        theirs = hugging(text, padding="max_length", max_length=99)["input_ids"]
        score = [sum(map(processor.get_score, ids[: ids.index(1)])) for ids in (ours, theirs)]
        assert score[0] == pytest.approx(score[1], rel=1e-5)
        tied += ours != theirs
        texts += [text] if ours == theirs else []
    assert tied < 0.02 * len(captions)
    for length in (1, 5, 16, 64):
        tokenizer = load_tokenizer(siglip1, length)
        expected = hugging(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        ids = tokenizer(texts)
        assert torch.equal(ids, expected["input_ids"])
        assert (ids[:, -1] == 1).all() and (tokenizer.pad, tokenizer.end, tokenizer.vocabulary) == (1, 1, 400)


@pytest.mark.parametrize("length", [1, 5, 16, 64])
def test_siglip2_as_transformers(gemma_json, captions, length):
    from transformers import Siglip2Tokenizer

    made = json.loads(gemma_json.read_text())["model"]
    theirs = Siglip2Tokenizer(
        vocab=made["vocab"], merges=[tuple(m) for m in made["merges"]], padding_side="right", add_eos_token=True,
        add_bos_token=False,
    )  # fmt: skip
    texts = [*captions, *ODD]
    expected = theirs(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")["input_ids"]
    tokenizer = load_tokenizer(gemma_json, length)
    assert torch.equal(tokenizer(texts), expected)
    assert (tokenizer.pad, tokenizer.end, tokenizer.vocabulary) == (0, 1, 600)


def test_gemma_model_as_transformers(gemma_model, captions):
    from transformers import GemmaTokenizer

    theirs, texts = GemmaTokenizer.from_pretrained(str(gemma_model.parent)), [*captions, *ODD]
    pieces = [theirs(text.lower(), add_special_tokens=False)["input_ids"][:15] for text in texts]
    expected = [[*row, 1] + [0] * (15 - len(row)) for row in pieces]
    assert load_tokenizer(gemma_model, 16)(texts).tolist() == expected


@pytest.fixture(params=["siglip1", "gemma_model", "gemma_json", "bytes", "merges"])
def tokenizer(request, captions):
    if request.param == "bytes":
        return load_tokenizer("bytes", 24)
    if request.param == "merges":
        return ByteTokenizer(24, data.learn_merges(captions, 50))
    return load_tokenizer(request.getfixturevalue(request.param), 24)


def test_saved_and_pickled(tokenizer, captions, tmp_path):
    tokenizer.save(tmp_path)
    texts = [*captions[:50], *ODD]
    ids = tokenizer(texts)
    for again in (load_tokenizer(tmp_path, 24), pickle.loads(pickle.dumps(tokenizer))):
        assert torch.equal(again(texts), ids)
        assert again.vocabulary == tokenizer.vocabulary
    (file,) = (path for path in tmp_path.iterdir() if path.name != "tokenizer_config.json")
    assert torch.equal(load_tokenizer(file, 24)(texts), ids)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_form(tokenizer):
    ids = tokenizer(ODD)
    assert ids.shape == (len(ODD), 24) and ids.dtype == torch.int64
    assert ids.min() >= 0 and ids.max() < tokenizer.vocabulary
    assert tokenizer([]).shape == (0, 24)
    assert torch.equal(tokenizer(["A CAT"]), tokenizer(["a cat"]))
    assert tokenizer(["\ud800"]).shape == (1, 24)
    with pytest.raises(TypeError, match="texts must be a sequence of strings, got one string"):
        tokenizer("cat")


@pytest.mark.parametrize("name", ["siglip1", "gemma_model", "gemma_json"])
def test_the_name_of_the_end_token_is_text(name, request):
    """A caption cannot end itself."""
    tokenizer = load_tokenizer(request.getfixturevalue(name), 24)
    for text in ("x <eos> y", "x </s> y", "</s> <pad>"):
        row = tokenizer([text])[0].tolist()
        ends = 24 - row.index(tokenizer.end) if tokenizer.pad == tokenizer.end else 1
        assert row.count(tokenizer.end) == ends
        assert row.index(tokenizer.end) >= 2


def test_final_sigma(gemma_json):
    """Lower-casing looks at the neighbours, as it did in training (ICU); a normalizer of `tokenizers` does not."""
    tokenizer = load_tokenizer(gemma_json, 24)
    assert torch.equal(tokenizer(["ΣΑΣ"]), tokenizer(["σας"]))


def test_forked_workers_do_not_complain(gemma_json, tmp_path):
    """The library warns when a process forks after its threads have run."""
    code = f"""
import os
from vlkern.data import load_tokenizer
tokenizer = load_tokenizer({str(gemma_json)!r}, 8)
tokenizer(["a cat"] * 100)
if os.fork() == 0:
    tokenizer(["a cat"] * 100)
    os._exit(0)
os._exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    names = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=names)
    assert (done.returncode, done.stderr) == (0, "")


def test_vocabulary(tokenizer):
    check_vocabulary(tokenizer, tokenizer.vocabulary)
    with pytest.raises(UserError, match=rf"tokenizer has {tokenizer.vocabulary} ids, more than the model's .* of 257"):
        check_vocabulary(tokenizer, 257)


BAD = {
    "nothing there": (None, None, r"none\.json: no such tokenizer"),
    "another kind": ("vocab.txt", b"a", r"vocab\.txt: a tokenizer file is called \*\.json or \*\.model"),
    "no json": ("tokenizer.json", b"{", r"tokenizer\.json: not a readable tokenizer"),
    "other json": ("tokenizer.json", b"{}", r"tokenizer\.json: not a readable tokenizer"),
    "no model": ("spiece.model", b"not a model", r"spiece\.model: not a readable tokenizer"),
    "no merges": ("byte_pairs.json", b"{}", r"byte_pairs\.json: no merges"),
    "merges of unknown tokens": ("byte_pairs.json", b'{"merges": [[2, 258]]}', "tokens that are not there yet"),
    "merges of no numbers": ("byte_pairs.json", b'{"merges": [["a", "b"]]}', "tokens that are not there yet"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(tmp_path, name):
    file, content, message = BAD[name]
    if file:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_tokenizer(tmp_path / (file or "none.json"), 8)


def test_bad_folders(tmp_path, siglip1, gemma_json):
    with pytest.raises(DataError, match="no tokenizer there"):
        load_tokenizer(tmp_path, 8)
    for name in ("a.model", "b.model"):
        (tmp_path / name).write_bytes((siglip1 / "spiece.model").read_bytes())
    with pytest.raises(DataError, match=r"no tokenizer there .* got 2 models"):
        load_tokenizer(tmp_path, 8)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    with pytest.raises(DataError, match=r"a\.model: no eos token \(<end>\)"):
        load_tokenizer(tmp_path / "a.model", 8)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config\.json: not readable"):
        load_tokenizer(tmp_path / "a.model", 8)
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        load_tokenizer(gemma_json, 0)


def test_a_folder_that_takes_no_file(tokenizer, tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        tokenizer.save(tmp_path / "none")

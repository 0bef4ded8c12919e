"""generate: the same as running the whole text anew for every token, for every model, batch and chunk."""

import math

import pytest
import torch
from PIL import Image

from vlkern import data
from vlkern.errors import UserError
from vlkern.generation import GREEDY, Sampler, Times, generate, prompt_of
from vlkern.models.gemma import Gemma, GemmaConfig
from vlkern.models.gemma3 import Gemma3, Gemma3Config
from vlkern.models.paligemma import PaliGemma, PaliGemmaConfig
from vlkern.models.siglip import VisionConfig

WORDS = data.load_vocabulary("bytes")
SIZES = {
    "width": 32, "depth": 3, "heads": 2, "kv_heads": 1, "head_dim": 16, "mlp": 48, "query_scalar": 16, "context": 256,
    "vocabulary": 1344,
}  # fmt: skip
VISION = VisionConfig(width=24, depth=1, heads=3, mlp=32, image_size=(16, 16), patch=4)
#: Every kind of model; the windows are smaller than the prompts.
MODELS = {
    "gemma1": lambda: Gemma(GemmaConfig(**SIZES, version=1)),
    "gemma3": lambda: Gemma(GemmaConfig(**SIZES, version=3, pattern="LLG", window=8)),
    "paligemma": lambda: PaliGemma(PaliGemmaConfig(VISION, GemmaConfig(**SIZES, version=1), 1283, 1283)),
    "paligemma2": lambda: PaliGemma(
        PaliGemmaConfig(
            VISION,
            GemmaConfig(**SIZES, version=2, pattern="LG", window=8, attention_softcap=50.0, final_softcap=30.0),
            1283, 1283,
        )
    ),
    "gemma3-vision": lambda: Gemma3(
        Gemma3Config(VISION, GemmaConfig(**SIZES, version=3, pattern="LLG", window=8), 4, 1285, 1283, 1284, 1285)
    ),
}  # fmt: skip
SAMPLER = Sampler(temperature=1.5, top_k=50, seed=7)


class Named(data.BytePieces):
    """Bytes with the two tokens around Gemma 3's images."""

    def __init__(self):
        super().__init__()
        self._names = {"<start_of_image>": 1283, "<end_of_image>": 1284}

    @property
    def _first_location(self):
        return 259

    @property
    def size(self):
        return 1285

    @size.setter
    def size(self, value):
        pass

    def piece(self, token):
        return super().piece(token) if token < 1283 else b""

    def token(self, name):
        return self._names.get(name, super().token(name))


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    """(model, its vocabulary)"""
    torch.manual_seed(0)
    model = MODELS[request.param]()
    for p in model.parameters():
        if p.dim() == 1 or not p.any():
            torch.nn.init.normal_(p, std=0.2)
    return model, Named() if isinstance(model, Gemma3) else WORDS


def picture(colour):
    return Image.new("RGB", (9, 7), colour)


def questions(model):
    """Prompts of three lengths, with as many pictures as possible."""
    texts = ["Hello there", "ab", "a longer prompt than the others"]
    if isinstance(model, Gemma):
        return texts, None
    return texts, [[picture("red")], [picture("green"), picture("blue")], []]


def anew(model, words, text, images, sampler, steps):
    """Tokens and log-probabilities without caches and batches."""
    prompt = prompt_of(model, text, words, images)
    ids, log_probs = list(prompt.ids), []
    u = sampler.uniforms(1, steps)
    for step in range(steps):
        row, cu_seqlens = torch.tensor(ids), torch.tensor([0, len(ids)], dtype=torch.int32)
        embed = () if prompt.pixels is None else (prompt.pixels,)
        until = {}
        if isinstance(model, PaliGemma):
            until = {"until": model.until(row, cu_seqlens, torch.tensor([prompt.prefix]))}
        elif isinstance(model, Gemma3):
            until = {"until": model.until(row, cu_seqlens)}
        hidden = model.hidden(model.embed(row, *embed), cu_seqlens, **until)
        logits = model.logits(hidden[-1:])[:, : min(words.size, SIZES["vocabulary"])]
        token = int(sampler.draw(logits, u[:, step]))
        ids.append(token)
        log_probs.append(float(logits.log_softmax(-1)[0, token]))
        if token == words.end:
            break
    return ids[len(prompt.ids) :], log_probs


@pytest.fixture(scope="module")
def expected(case):
    model, words = case
    texts, images = questions(model)
    with torch.inference_mode():
        return [
            anew(model, words, text, mine, SAMPLER, 14)
            for text, mine in zip(texts, images or [[]] * len(texts), strict=True)
        ]


@pytest.mark.parametrize("chunk", [1000, 7])
def test_batches_and_chunks_change_nothing(chunk, case, expected):
    model, words = case
    texts, images = questions(model)
    found = generate(
        model, texts, images=images, tokenizer=words, max_new_tokens=14, sampler=SAMPLER, prefill_chunk=chunk
    )
    for completion, (tokens, log_probs) in zip(found, expected, strict=True):
        assert list(completion.tokens) == tokens
        torch.testing.assert_close(torch.tensor(completion.log_probs), torch.tensor(log_probs), rtol=0, atol=2e-5)
        assert completion.reason == ("end" if tokens[-1] == words.end else "length")
        assert completion.score == pytest.approx(math.fsum(log_probs), abs=1e-3)


def test_a_row_alone(case, expected):
    """The same seed gives the same tokens whatever else is in the batch."""
    model, words = case
    texts, images = questions(model)
    order = [2, 0]
    found = generate(
        model, [texts[i] for i in order], images=images and [images[i] for i in order], tokenizer=words,
        max_new_tokens=14, sampler=SAMPLER,
    )  # fmt: skip
    assert [list(completion.tokens) for completion in found] == [expected[i][0] for i in order]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return MODELS["gemma3"]()


def test_stop_strings_end_tokens_and_the_stream(model):
    sampler = Sampler(temperature=2.0, seed=[1, 2, 3])
    whole = generate(model, ["a", "b", "c"], tokenizer=WORDS, max_new_tokens=20, sampler=sampler)
    text = whole[1].text
    stop = text[5:8]
    shown = {0: "", 1: "", 2: ""}

    def callback(row, piece):
        shown[row] += piece

    found = generate(
        model, ["a", "b", "c"], tokenizer=WORDS, max_new_tokens=20, sampler=sampler, stop=stop, callback=callback
    )
    assert found[1].text == text[: text.index(stop)] and found[1].reason == "stop"
    assert found[1].tokens == whole[1].tokens[: len(found[1].tokens)] and len(found[1].tokens) < 20
    assert [shown[i] for i in range(3)] == [completion.text for completion in found]
    assert found[0] == whole[0] or stop in whole[0].text
    end = whole[2].tokens[3]
    ended = generate(model, ["a", "b", "c"], tokenizer=WORDS, max_new_tokens=20, sampler=sampler, end=[end])[2]
    assert ended.tokens == whole[2].tokens[: whole[2].tokens.index(end) + 1] and ended.reason == "end"


def test_tokens_without_a_tokenizer(model):
    times = Times()
    [found] = generate(model, [[2, 40, 41]], max_new_tokens=5, times=times)
    assert len(found.tokens) == 5 and found.text == "" and found.reason == "length"
    assert (times.prompt, times.steps) == (3, 4) and times.prefill > 0 and times.decode > 0
    assert generate(model, []) == []


def test_repetition_penalty(model):
    """What was said becomes less likely, the prompt included."""
    [plain] = generate(model, [[2, 40]], max_new_tokens=12)
    [other] = generate(model, [[2, 40]], max_new_tokens=12, sampler=Sampler(temperature=0, repetition_penalty=1e6))
    assert len(set(plain.tokens)) < len(plain.tokens)  # untrained models repeat themselves
    assert len({2, 40, *other.tokens}) == 14


def test_int8_caches(model):
    """The numbers change a little, and not what is likely."""
    prompt = [[2, *range(30, 60)]]
    [plain], [found] = (generate(model, prompt, max_new_tokens=8, cache_dtype=dtype) for dtype in (None, torch.int8))
    assert found.tokens == plain.tokens and found.log_probs != plain.log_probs
    torch.testing.assert_close(torch.tensor(found.log_probs), torch.tensor(plain.log_probs), rtol=0, atol=0.03)


def test_bfloat16(model):
    low = MODELS["gemma3"]()
    low.load_state_dict(model.state_dict())
    prompt = [[2, *range(30, 60)], [2, 3]]
    for ours, theirs in zip(
        generate(low.bfloat16(), prompt, max_new_tokens=4), generate(model, prompt, max_new_tokens=4), strict=True
    ):
        assert ours.log_probs[0] == pytest.approx(theirs.log_probs[0], abs=0.1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompts": "ab"}, TypeError, "prompts must be a sequence, got one string"),
        (
            {"model": torch.nn.ReLU(), "prompts": ["a"]},
            TypeError,
            "model must be a Gemma, PaliGemma or Gemma3, got ReLU",
        ),
        ({"prompts": ["ab"], "tokenizer": None}, ValueError, "prompts need a tokenizer where they are texts"),
        ({"prompts": [[]]}, ValueError, "prompts must have at least one token"),
        ({"prompts": [[2, 3.0]]}, TypeError, "prompts must be texts, whole numbers or Prompts, got float"),
        ({"prompts": [[2, 1344]]}, ValueError, "prompts must have tokens from 0 to 1343, got 2 to 1344"),
        ({"prompts": [[2] * 30], "capacity": 40}, ValueError, "room for 12 new tokens in caches of 40, got one of 30"),
        ({"prompts": ["a"], "max_new_tokens": 0}, ValueError, "max_new_tokens must be a whole number above 0, got 0"),
        ({"prompts": ["a"], "prefill_chunk": 0.5}, ValueError, "prefill_chunk must be a whole number above 0"),
        ({"prompts": ["a"], "stop": [""]}, ValueError, "stop must be strings that are not empty"),
        ({"prompts": [[5]], "stop": "a", "tokenizer": None}, ValueError, "stop needs a tokenizer"),
        ({"prompts": ["a"], "callback": 3}, TypeError, "callback must be a function of row and text, got int"),
        ({"prompts": ["a"], "images": [[], []]}, ValueError, "images must be one sequence for each of the 1 prompts"),
        ({"prompts": ["a"], "images": [[b""]]}, UserError, "images: Gemma sees none, got 1"),
        ({"prompts": ["a", "b"], "sampler": Sampler(seed=[1])}, ValueError, "one for each of the 2 rows, got 1"),
        ({"prompts": ["a"], "cache_dtype": torch.bfloat16}, ValueError, "cache_dtype must be torch.int8 or that of"),
    ],
)
def test_bad_arguments(arguments, error, message, model, monkeypatch):
    monkeypatch.setattr(model, "extend", None)  # nothing is computed
    with pytest.raises(error, match=message):
        generate(**{"model": model, "tokenizer": WORDS, "max_new_tokens": 12, **arguments})


def test_pictures_and_places():
    torch.manual_seed(0)
    model = MODELS["paligemma"]()
    with pytest.raises(ValueError, match="prompts must have 16 places"):
        generate(model, [[1283] * 15 + [2]])
    with pytest.raises(ValueError, match="prompts must have 16 places"):
        generate(model, [data.Prompt((2, 5), torch.zeros(1, 3, 16, 16), 2)])
    with pytest.raises(UserError, match="image 2: no readable picture"):
        generate(model, ["a"], images=[[picture("red"), b"nothing"]], tokenizer=WORDS)
    with pytest.raises(ValueError, match="images belong to texts"):
        generate(model, [[2]], images=[[picture("red")]])


def test_logits_that_are_not_finite(model):
    broken = MODELS["gemma3"]()
    torch.nn.init.constant_(broken.model.norm.weight, math.nan)
    with pytest.raises(ValueError, match="model must give finite logits, got nan for row 0 in step 0"):
        generate(broken, [[2, 3]], sampler=GREEDY)

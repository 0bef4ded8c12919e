"""Prompts to answers: prefill, then a token for each row and step until every row has ended."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from vlkern.generation.prompts import prompt_of
from vlkern.generation.sampling import GREEDY, Sampler
from vlkern.generation.session import Session
from vlkern.generation.stream import TextStream, check_stops

if TYPE_CHECKING:
    from vlkern.data.prompts import Picture, Prompt
    from vlkern.data.vocabulary import Vocabulary

#: Called with the number of the prompt and the next piece of its answer.
Callback = Callable[[int, str], None]


@dataclass(frozen=True)
class Completion:
    """What a model wrote.

    text       without end token and stop string; empty without a tokenizer
    tokens     all that were chosen, the end token and those of the stop string among them
    log_probs  of each token: log softmax of the model's own logits, before temperature, filters and penalty
    reason     "end" token, "stop" string, or "length"
    """

    text: str
    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    reason: str

    @property
    def score(self) -> float:
        """Log-probability of the whole answer: the sum up to the end token."""
        return math.fsum(self.log_probs)


def best_of(completions: Sequence[Completion], n: int) -> list[Completion]:
    """The completion with the highest score of every n that follow each other; the first of equal ones.

    Raises:
        ValueError: their number is no multiple of n.

    Example:
        >>> short, long = Completion("a", (5, 1), (-0.5, -0.2), "end"), Completion("b", (6, 1), (-0.1, -0.3), "end")
        >>> best_of([short, long], 2)[0].text
        'b'
    """
    if n < 1 or len(completions) % n:
        raise ValueError(f"n must divide the number of completions, {len(completions)}, got {n}")
    groups = (completions[i : i + n] for i in range(0, len(completions), n))
    return [max(group, key=lambda completion: completion.score) for group in groups]


@dataclass
class Times:
    """How long it took: `prompt` tokens in `prefill` seconds, and `steps` of one token a row in `decode` seconds."""

    prompt: int = 0
    prefill: float = 0.0
    steps: int = 0
    decode: float = 0.0


@dataclass
class _Row:
    """One answer that grows."""

    stream: TextStream | None
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    reason: str = ""

    def push(self, token: int, log_prob: float, ends: frozenset[int]) -> None:
        """The next token, unless the answer has ended."""
        if self.reason:
            return
        self.tokens.append(token)
        self.log_probs.append(log_prob)
        if token in ends:
            self.reason = "end"
        elif self.stream is not None and self.stream.push(token):
            self.reason = "stop"
        if self.reason and self.stream is not None:
            self.stream.end()

    def finish(self) -> None:
        """No token follows."""
        if not self.reason:
            self.reason = "length"
            if self.stream is not None:
                self.stream.end()

    def completion(self) -> Completion:
        """As the caller gets it."""
        text = "" if self.stream is None else self.stream.text
        return Completion(text, tuple(self.tokens), tuple(self.log_probs), self.reason)


def generate(
    model: Any,
    prompts: "Sequence[str | Sequence[int] | Prompt]",
    *,
    tokenizer: "Vocabulary | None" = None,
    images: "Sequence[Sequence[Picture]] | None" = None,
    max_new_tokens: int = 128,
    sampler: Sampler = GREEDY,
    stop: str | Sequence[str] = (),
    end: Sequence[int] | None = None,
    callback: Callback | None = None,
    capacity: int | None = None,
    prefill_chunk: int = 2048,
    cache_dtype: torch.dtype | None = None,
    times: Times | None = None,
) -> list[Completion]:
    """Continue each prompt.

    Rows may have any lengths: their tokens are packed, nothing is padded, and a row's answer does not depend on what
    else is in the batch, beyond rounding. A row that has ended stays in the batch until all have.

    Args:
        model: Gemma, PaliGemma or Gemma3, on any device.
        prompts: for each row a text, which becomes tokens as the model was trained (`prompt_of`), or tokens, or a
            `vlkern.data.Prompt` with its pictures, which are taken as they are.
        tokenizer: from `vlkern.data.load_vocabulary`; needed for texts, and to give texts back. Ids that it does not
            have are never chosen.
        images: for each row of text its pictures, as Pillow's images or the contents of files.
        max_new_tokens: the most tokens of an answer. A row may outgrow the context that its model was trained for
            (`config.context`): the answer then gets worse, and nothing says so.
        sampler: how a token is chosen; the most likely one by default.
        stop: an answer ends before any of these strings.
        end: tokens that end an answer; by default the tokenizer's end token and, where there is one, `<end_of_turn>`.
        callback: called with the number of the row and each new piece of its text: whole characters, and nothing that
            may belong to a stop string.
        capacity: tokens that a row may have in the caches; as many as needed by default.
        prefill_chunk: about how many tokens of the prompts run at once. Tokens that see each other, an image or a
            prefix, are never cut apart.
        cache_dtype: torch.int8 halves the caches of a bfloat16 model. None is the dtype of the model.
        times: is filled in.

    Returns:
        A completion for each prompt.

    Raises:
        TypeError, ValueError: an argument is of no use, among them a prompt that does not fit the caches with its
            answer, and images that do not match the prompt's places for them; before anything is computed. While
            running: the model's logits are not finite.

    Example:
        >>> model, tokenizer = vlkern.models.create("gemma3-tiny"), vlkern.data.load_vocabulary("bytes")
        >>> [answer] = generate(model, ["Once"], tokenizer=tokenizer, max_new_tokens=8)
        >>> len(answer.tokens), answer.reason
        (8, 'length')
    """
    _check(model, prompts, max_new_tokens, prefill_chunk, callback, cache_dtype)
    stops = check_stops(stop)
    if stops and tokenizer is None:
        raise ValueError("stop needs a tokenizer, got none")
    if not prompts:
        return []
    pictures = [()] * len(prompts) if images is None else list(images)
    if len(pictures) != len(prompts):
        raise ValueError(f"images must be one sequence for each of the {len(prompts)} prompts, got {len(pictures)}")
    given = [prompt_of(model, prompt, tokenizer, picture) for prompt, picture in zip(prompts, pictures, strict=True)]
    longest = max(len(prompt.ids) for prompt in given)
    needed = longest + max_new_tokens
    if capacity is not None and needed > capacity:
        raise ValueError(
            f"prompts must leave room for {max_new_tokens} new tokens in caches of {capacity}, got one of {longest}"
        )
    choose = _Chooser(sampler, model, given, tokenizer, max_new_tokens)
    rows = [_stream(tokenizer, stops, callback, row) for row in range(len(given))]
    ends = frozenset(_ends(tokenizer) if end is None else end)
    pixels = [prompt.pixels for prompt in given if prompt.pixels is not None]
    with torch.inference_mode():
        session = Session(
            model, [prompt.ids for prompt in given], torch.cat(pixels) if pixels else None,
            capacity=capacity or needed, room=prefill_chunk, cache_dtype=cache_dtype,
        )  # fmt: skip
        _run(session, choose, rows, ends, max_new_tokens, Times() if times is None else times)
    return [row.completion() for row in rows]


def _check(
    model: Any, prompts: Any, max_new_tokens: Any, prefill_chunk: Any, callback: Any, cache_dtype: torch.dtype | None
) -> None:
    if not hasattr(model, "new_caches"):
        raise TypeError(f"model must be a Gemma, PaliGemma or Gemma3, got {type(model).__name__}")
    if isinstance(prompts, str):
        raise TypeError("prompts must be a sequence, got one string")
    for name, value in (("max_new_tokens", max_new_tokens), ("prefill_chunk", prefill_chunk)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be a whole number above 0, got {value!r}")
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be a function of row and text, got {type(callback).__name__}")
    dtype = next(model.parameters()).dtype
    if cache_dtype not in (None, torch.int8, dtype):
        raise ValueError(f"cache_dtype must be torch.int8 or that of the model, {dtype}, got {cache_dtype}")


def _run(
    session: Session, choose: "_Chooser", rows: Sequence[_Row], ends: frozenset[int], most: int, times: Times
) -> None:
    """Prompts, then at most so many tokens for each row."""
    begin = time.perf_counter()
    logits = session.prefill()
    times.prompt, times.prefill = session.tokens, time.perf_counter() - begin
    begin = time.perf_counter()
    for step in range(most):
        tokens, log_probs = choose(logits, step)
        for row, token, log_prob in zip(rows, tokens.tolist(), log_probs.tolist(), strict=True):
            row.push(token, log_prob, ends)
        if step + 1 == most or all(row.reason for row in rows):
            break
        logits = session.step(tokens)
        times.steps, times.decode = step + 1, time.perf_counter() - begin
    for row in rows:
        row.finish()


def _stream(tokenizer: "Vocabulary | None", stops: Sequence[str], callback: Callback | None, row: int) -> _Row:
    if tokenizer is None:
        return _Row(None)
    return _Row(TextStream(tokenizer, stops, None if callback is None else lambda text: callback(row, text)))


def _ends(tokenizer: "Vocabulary | None") -> list[int]:
    """Of a tuned model an answer ends with its turn."""
    if tokenizer is None:
        return []
    turn = tokenizer.token("<end_of_turn>")
    return [tokenizer.end] if turn is None else [tokenizer.end, turn]


class _Chooser:
    """Draws the tokens of each step; knows which tokens are in prompt and answer where there is a penalty for them."""

    def __init__(
        self,
        sampler: Sampler,
        model: Any,
        prompts: "Sequence[Prompt]",
        tokenizer: "Vocabulary | None",
        steps: int,
    ) -> None:
        device = next(model.parameters()).device
        self._sampler = sampler
        self._uniforms = sampler.uniforms(len(prompts), steps).to(device)
        language = getattr(model.config, "language", model.config)
        limits = [language.vocabulary, getattr(model.config, "sampled_vocabulary", language.vocabulary)]
        self._limit = min([*limits, *([] if tokenizer is None else [tokenizer.size])])
        self._seen: torch.Tensor | None = None
        if sampler.repetition_penalty != 1:
            self._seen = torch.zeros(len(prompts), self._limit, dtype=torch.bool, device=device)
            for seen, prompt in zip(self._seen, prompts, strict=True):
                said = [token for token in prompt.ids if token < self._limit]
                seen[torch.tensor(said, dtype=torch.int64, device=device)] = True

    def __call__(self, logits: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [B, V] -> tokens [B] int64 and their log-probabilities [B]."""
        logits = logits[:, : self._limit]
        total = logits.logsumexp(-1)
        if not bool(total.isfinite().all()):
            row = int(total.isfinite().int().argmin())
            raise ValueError(f"model must give finite logits, got {float(total[row])} for row {row} in step {step}")
        penalised = logits if self._seen is None else self._sampler.penalise(logits, self._seen)
        tokens = self._sampler.draw(penalised, self._uniforms[:, step])
        if self._seen is not None:
            self._seen.scatter_(1, tokens[:, None], True)
        return tokens, logits.gather(1, tokens[:, None])[:, 0] - total

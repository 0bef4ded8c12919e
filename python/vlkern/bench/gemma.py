"""`python -m vlkern.bench.gemma`: a step of decoding, and the prefill of a prompt, beside transformers.

Decoding is measured at several lengths of the context, whose keys and values are random numbers, the same for both;
a step reads every weight once, so reading is its ceiling. The weights are the same, and so are the logits, which is
checked against float64 first. The results are written and shown like those of an op, as gemma_decode and
gemma_prefill.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from vlkern.bench import peers
from vlkern.bench.models import Call, Event, add_arguments, run
from vlkern.caches import Caches
from vlkern.models import gemma_files
from vlkern.models.gemma import PRESETS, Gemma, GemmaConfig


def twins(config: GemmaConfig) -> tuple[Gemma, nn.Module]:
    """Ours and transformers', with the same parameters."""
    ours = Gemma(config)
    transformers = peers.load("transformers")
    auto = transformers.AutoConfig.for_model(**gemma_files.to_json(config, torch.float32))
    theirs: nn.Module = transformers.AutoModelForCausalLM.from_config(auto)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    return ours, theirs


def _cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy whose parameters have this dtype. Buffers stay: a table of RoPE's angles in bfloat16 would be useless."""
    model = copy.deepcopy(model).eval()
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model


def contents(c: GemmaConfig, length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values [length, K, C] of every layer, of a size that attention is not about one token alone."""
    g = torch.Generator().manual_seed(1)
    return [
        tuple(torch.randn(2, length, c.kv_heads, c.head_dim, generator=g).unbind())  # type: ignore[misc]
        for _ in range(c.depth)
    ]


def filled(model: Gemma, length: int) -> Caches:
    """Caches of one row that hold `length` tokens, and have room for one more."""
    caches = model.new_caches(1, length + 1)
    positions = torch.arange(length)
    for layer, (k, v) in zip(caches.layers, contents(model.config, length), strict=True):
        last = positions[-layer.slots :]
        layer.k[0, last % layer.slots] = k[last].to(layer.dtype)
        layer.v[0, last % layer.slots] = v[last].to(layer.dtype)
    caches.length.fill_(length)
    caches.high.fill_(length)
    return caches


def our_step(model: Gemma, dtype: torch.dtype, length: int) -> Call:
    """One token after `length` others -> logits [V]; then it is forgotten again."""
    model = copy.deepcopy(model).to(dtype).eval()
    caches, token = filled(model, length), torch.tensor([7])

    def call() -> torch.Tensor:
        with torch.inference_mode():
            logits = model.logits(model.extend(model.embed(token), caches.step(), caches))[0]
            caches.rollback(1)
            return logits

    return call


def their_step(model: nn.Module, config: GemmaConfig, dtype: torch.dtype, length: int) -> Call:
    """The same of transformers. Its cache keeps the token, so the context grows by one with each call."""
    model = _cast(model, dtype)
    cache = peers.load("transformers").DynamicCache(config=model.config)
    for i, (k, v) in enumerate(contents(config, length)):
        cache.update(*(x.transpose(0, 1)[None].to(dtype) for x in (k, v)), i)
    token, at = torch.tensor([[7]]), [length]

    def call() -> torch.Tensor:
        with torch.inference_mode():
            out: Any = model(token, past_key_values=cache, position_ids=torch.tensor([at]), use_cache=True)
            at[0] += 1
            return out.logits[0, -1].float()

    return call


def bytes_of_step(model: Gemma, length: int, dtype: torch.dtype) -> float:
    """The weights, of which the embedding table is the output layer, and the keys and values that the token sees."""
    c = model.config
    windows = [c.window if kind == "L" and c.window is not None else length + 1 for kind in c.kinds]
    elements = sum(p.numel() for p in model.parameters())
    elements += 2 * c.kv_heads * c.head_dim * sum(min(length + 1, w) for w in windows)
    return float(elements * dtype.itemsize)


def decode_event(models: tuple[Gemma, nn.Module], preset: str, length: int) -> Event:
    """A step after a context of `length` tokens."""
    ours, theirs = models

    def enter(dtype: torch.dtype) -> dict[str, Callable[[], Call]]:
        return {
            "vlkern": lambda: our_step(ours, dtype, length),
            "transformers": lambda: their_step(theirs, ours.config, dtype, length),
        }

    truth = our_step(ours, torch.float64, length)
    return Event(f"{preset} token", [1, length], "forward", partial(bytes_of_step, ours, length), enter, truth)


def prefill_flops(c: GemmaConfig, tokens: int) -> float:
    """2 FLOPs a weight of the layers and token, attention's products over what tokens see, and one row of logits."""
    heads = (2 * c.heads + 2 * c.kv_heads) * c.head_dim
    weights = c.depth * c.width * (heads + 3 * c.mlp)
    seen = sum(min(i + 1, c.window if kind == "L" and c.window else tokens) for kind in c.kinds for i in range(tokens))
    return float(2 * weights * tokens + 4 * c.heads * c.head_dim * seen + 2 * c.vocabulary * c.width)


def prefill_event(models: tuple[Gemma, nn.Module], preset: str, tokens: int) -> Event:
    """A prompt into empty caches -> the logits after its last token."""
    ours, theirs = models
    ids = torch.randint(0, ours.config.vocabulary, (tokens,), generator=torch.Generator().manual_seed(0))
    cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32)

    def our_call(dtype: torch.dtype) -> Call:
        model = copy.deepcopy(ours).to(dtype).eval()

        def call() -> torch.Tensor:
            with torch.inference_mode():
                caches = model.new_caches(1, tokens + 1)
                return model.logits(model.extend(model.embed(ids), caches.chunk(cu_seqlens), caches)[-1])

        return call

    def their_call(dtype: torch.dtype) -> Call:
        model: Any = _cast(theirs, dtype)

        def call() -> torch.Tensor:
            with torch.inference_mode():
                logits: torch.Tensor = model(ids[None], logits_to_keep=1, use_cache=True).logits
                return logits[0, -1].float()

        return call

    def enter(dtype: torch.dtype) -> dict[str, Callable[[], Call]]:
        return {"vlkern": lambda: our_call(dtype), "transformers": lambda: their_call(dtype)}

    work = prefill_flops(ours.config, tokens)
    return Event(f"{preset} prompt", [1, tokens], "forward", work, enter, our_call(torch.float64))


def main(argv: list[str] | None = None) -> int:
    """Runs the races, prints them and writes <out>/<hardware>/gemma_decode.json and gemma_prefill.json with plots."""
    parser = argparse.ArgumentParser(prog="python -m vlkern.bench.gemma", description=__doc__)
    parser.add_argument("--preset", default="gemma-3-270m", choices=sorted(PRESETS))
    parser.add_argument("--contexts", type=int, nargs="*", default=[64, 2048, 8192], help="tokens before the step")
    parser.add_argument("--prompts", type=int, nargs="*", default=[2048], help="tokens of the prompts to prefill")
    add_arguments(parser)
    args = parser.parse_args(argv)
    models = twins(PRESETS[args.preset])
    status = 0
    if args.contexts:
        events = [partial(decode_event, models, args.preset, length) for length in args.contexts]
        status |= run("gemma_decode", parser, args, ("transformers",), events, ceiling="read")
    if args.prompts:
        events = [partial(prefill_event, models, args.preset, tokens) for tokens in args.prompts]
        status |= run("gemma_prefill", parser, args, ("transformers",), events)
    return status


if __name__ == "__main__":
    sys.exit(main())

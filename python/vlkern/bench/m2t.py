"""`python -m vlkern.bench.m2t`: the probabilities of whole tiles, M2T's cached steps beside MT's S full passes.

Both decode T tiles by transformers of one size: a step predicts, symbols are made of its parameters (the mean of the
likeliest Gaussian, rounded, in place of an entropy coder), and the next step sees them. What M2T saves: it sends each
token through the transformer once, MT sends all of them in every step. Before the race both are held against float64,
by what they predict from given symbols. Results are written and shown like those of an op.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import accumulate

import torch

from vlkern.bench.models import Call, Event, add_arguments, run
from vlkern.models.m2t import M2T, PRESETS, M2TConfig, StepCache
from vlkern.models.mt import MaskedSteps

NAME = "m2t"


def _drawn(params: torch.Tensor) -> torch.Tensor:
    """Symbols [T, n, C] of parameters [T, n, 3, K, C]."""
    logits, means, _ = params.unbind(2)
    return means.gather(2, logits.argmax(2, keepdim=True)).squeeze(2).round()


@torch.inference_mode()
def decode(model: M2T, tiles: int, level: int) -> torch.Tensor:
    """All steps of T tiles -> symbols [T, N, C] in coding order."""
    quality, previous, found = model.quality(level), None, []
    cache = StepCache(model.entropy, tiles, quality)
    for _ in model.config.groups:
        previous = _drawn(cache.advance(previous))
        found.append(previous)
    return torch.cat(found, 1)


@torch.inference_mode()
def decode_masked(model: M2T, tiles: int, level: int) -> torch.Tensor:
    """The same by MT in the order of M2T."""
    steps = MaskedSteps(model.entropy, tiles, model.quality(level))
    for _ in model.config.groups:
        steps.reveal(_drawn(steps.predict()[1]))
    return steps.tokens


def flops(c: M2TConfig, tiles: int) -> float:
    """Of all steps: 2 FLOPs a weight and token, and attention's two products."""
    weights = c.depth * (4 * c.width**2 + 2 * c.width * c.mlp) + (1 + 3 * c.components) * c.channels * c.width
    if c.bidirectional:
        passes, pairs = c.steps, c.steps * c.tokens**2
    else:
        passes, pairs = 1, sum(n * end for n, end in zip(c.groups, accumulate(c.groups), strict=True))
    return float(tiles * (2 * passes * c.tokens * weights + 4 * c.depth * c.width * pairs))


def _call(
    model: M2T, dtype: torch.dtype, first: Callable[[M2T], torch.Tensor], then: Callable[[M2T], torch.Tensor]
) -> Call:
    """The first call is compared, every other one is timed."""
    model = copy.deepcopy(model).to(dtype).eval()
    pending = [first]

    def call() -> torch.Tensor:
        return pending.pop()(model) if pending else then(model)

    return call


def event(preset: str, tiles: int) -> Event:
    """The race of one size of M2T with its MT, for T tiles at a time."""
    config = replace(PRESETS[preset], bidirectional=False)
    ours, theirs = M2T(config), M2T(replace(config, bidirectional=True))
    level, generator = config.levels // 2, torch.Generator().manual_seed(0)
    tokens = (4 * torch.randn(tiles, config.tokens, config.channels, generator=generator)).round()
    known = torch.rand(tokens.shape[:2], generator=generator) < 0.5

    def predict(model: M2T) -> torch.Tensor:
        """Of M2T the steps; in float64, as nothing is to be saved, one pass."""
        if model.log_gain.dtype == torch.float64:
            return model.entropy(tokens.double(), model.quality(level))
        cache, end = StepCache(model.entropy, tiles, model.quality(level)), 0
        found: list[torch.Tensor] = []
        for n in config.groups:
            before = tokens[:, end - len(found[-1][0]) : end] if found else None
            found.append(cache.advance(before))
            end += n
        return torch.cat(found, 1)

    def predict_masked(model: M2T) -> torch.Tensor:
        return model.entropy.forward_masked(tokens.to(model.log_gain.dtype), model.quality(level), known)

    @torch.inference_mode()
    def both(of_ours: Callable[[], torch.Tensor], of_theirs: Callable[[], torch.Tensor]) -> torch.Tensor:
        return torch.stack([of_ours().double(), of_theirs().double()])

    exact = {
        name: partial(_exact, model, how)
        for name, model, how in (("ours", ours, predict), ("theirs", theirs, predict_masked))
    }

    def enter(dtype: torch.dtype) -> dict[str, Callable[[], Call]]:
        # A contestant answers for its own model; in the place of the other's it repeats what is expected.
        return {
            "vlkern": lambda: _call(
                ours, dtype, lambda m: both(partial(predict, m), exact["theirs"]), lambda m: decode(m, tiles, level)
            ),
            "MT": lambda: _call(
                theirs, dtype, lambda m: both(exact["ours"], partial(predict_masked, m)),
                lambda m: decode_masked(m, tiles, level),
            ),
        }  # fmt: skip

    name = f"{preset} {config.steps} steps"
    shape = [tiles, config.tokens, config.channels]
    return Event(name, shape, "forward", flops(config, tiles), enter, lambda: both(exact["ours"], exact["theirs"]))


def _exact(model: M2T, how: Callable[[M2T], torch.Tensor]) -> torch.Tensor:
    return how(copy.deepcopy(model).double().eval())


def main(argv: list[str] | None = None) -> int:
    """Runs the races, prints them and writes <out>/<hardware>/m2t.json with its plots."""
    parser = argparse.ArgumentParser(prog="python -m vlkern.bench.m2t", description=__doc__)
    parser.add_argument("--preset", default="m2t-base", choices=sorted(n for n in PRESETS if n.startswith("m2t")))
    parser.add_argument("--tiles", type=int, nargs="+", default=[1], metavar="T", help="at a time")
    add_arguments(parser)
    args = parser.parse_args(argv)
    return run(NAME, parser, args, (), [partial(event, args.preset, tiles) for tiles in args.tiles])


if __name__ == "__main__":
    sys.exit(main())

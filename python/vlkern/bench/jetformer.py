"""`python -m vlkern.bench.jetformer`: a token of guided sampling from key/value caches, beside recomputing the rows.

The model has the sizes of the paper's, but fewer layers. A step takes the rows of all pictures, with and without their
class, runs the last token of each through the decoder, or all tokens when nothing is cached, and the last outputs
through the head of 263,168 numbers; then a token is drawn. Both have the same weights, and so give the same mixtures,
which is checked against float64 first. The flow runs once for a whole picture and is not part of a step. Places are
tokens that the picture has already; the middle one costs what a token costs on average. The results are written and
shown like those of an op, as jetformer_sampling.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from vlkern import ops
from vlkern.bench.models import Call, Event, add_arguments, run
from vlkern.models.jetformer import PRESETS, JetFormer, JetFormerConfig

GUIDANCE = 3.0


def rows(model: JetFormer, pictures: int, place: int) -> torch.Tensor:
    """Embedded rows [2 B, T, D] whose pictures have `place` tokens, for float64 as for float32 of the same numbers."""
    c, g = model.config, torch.Generator().manual_seed(0)
    ids = torch.randint(c.bos, (pictures, c.text_length), generator=g)
    words = model.words(torch.cat([ids, model.unlabelled(pictures)]))
    soft = torch.randn(pictures, c.tokens, c.modelled, generator=g).repeat(2, 1, 1).to(model.image_head.weight.dtype)
    parts = (model.embed(words).flatten(0, 1), model.embed_image(soft).flatten(0, 1), model.special())
    index = model.layout(ids.shape[1], None, torch.ones(2 * pictures, dtype=torch.bool)).source
    return torch.cat(parts)[index.view(2 * pictures, -1)[:, : words.shape[1] + c.specials + place]]


def _draw(model: JetFormer, hidden: torch.Tensor) -> torch.Tensor:
    """The mixtures of the next token, once one was drawn from them."""
    params = model.mixture(hidden)
    ops.gmm_guided_sample(*params.chunk(2), dims=model.config.modelled, guidance=GUIDANCE)
    return params


def cached(model: JetFormer, dtype: torch.dtype, pictures: int, place: int) -> Call:
    """The last token of each row after the others -> the mixtures [2 B, P]; then it is forgotten again."""
    model = copy.deepcopy(model).to(dtype).eval()
    with torch.inference_mode():
        x = rows(model, pictures, place)
        caches = model.language.new_caches(len(x), x.shape[1])
        before = torch.arange(len(x) + 1, dtype=torch.int32) * (x.shape[1] - 1)
        model.language.extend(x[:, :-1].flatten(0, 1), caches.chunk(before), caches)

    def call() -> torch.Tensor:
        with torch.inference_mode():
            params = _draw(model, model.language.extend(x[:, -1], caches.step(), caches))
            caches.rollback(1)
            return params

    return call


def recomputed(model: JetFormer, dtype: torch.dtype, pictures: int, place: int) -> Call:
    """The same from whole rows."""
    model = copy.deepcopy(model).to(dtype).eval()
    with torch.inference_mode():
        x = rows(model, pictures, place)
    starts = torch.arange(len(x) + 1, dtype=torch.int32) * x.shape[1]

    def call() -> torch.Tensor:
        with torch.inference_mode():
            hidden = model.language.hidden(x.flatten(0, 1), starts)
            return _draw(model, hidden[starts[1:].long() - 1])

    return call


def bytes_of_step(c: JetFormerConfig, pictures: int, place: int, dtype: torch.dtype) -> float:
    """What a cached step has to read: the weights of layers and head, and the keys and values of all rows."""
    g = c.decoder()
    weights = c.depth * c.width * ((2 * g.heads + 2 * g.kv_heads) * g.head_dim + 3 * g.mlp) + c.width * c.head
    keys = 2 * pictures * c.depth * 2 * g.kv_heads * g.head_dim * (c.text_length * c.repeats + c.specials + place)
    return float((weights + keys) * dtype.itemsize)


def event(model: JetFormer, name: str, pictures: int, place: int) -> Event:
    """A token after `place` others."""

    def enter(dtype: torch.dtype) -> dict[str, Callable[[], Call]]:
        return {
            "vlkern": lambda: cached(model, dtype, pictures, place),
            "recomputed": lambda: recomputed(model, dtype, pictures, place),
        }

    work = partial(bytes_of_step, model.config, pictures, place)
    return Event(name, [pictures, place], "forward", work, enter, cached(model, torch.float64, pictures, place))


def main(argv: list[str] | None = None) -> int:
    """Runs the races, prints them and writes <out>/<hardware>/jetformer_sampling.json with plots."""
    parser = argparse.ArgumentParser(prog="python -m vlkern.bench.jetformer", description=__doc__)
    add = parser.add_argument
    add("--preset", default="jetformer-350m-imagenet256", choices=sorted(PRESETS))
    add("--depth", type=int, default=8, help="layers of the decoder (8)")
    add("--pictures", type=int, default=4, help="that are sampled together (4)")
    add("--places", type=int, nargs="+", default=[1, 128, 255], help="tokens that the pictures have already")
    add_arguments(parser)
    args = parser.parse_args(argv)
    config = PRESETS[args.preset]
    config = replace(config, depth=args.depth, flow=replace(config.flow, depth=1))
    torch.manual_seed(0)
    model = JetFormer(config)
    torch.nn.init.normal_(model.image_head.weight, std=config.width**-0.5)  # else every mixture is the same
    name = f"{args.preset} token, {args.depth} layers"
    events = [partial(event, model, name, args.pictures, place) for place in args.places]
    return run("jetformer_sampling", parser, args, (), events, ceiling="read")


if __name__ == "__main__":
    sys.exit(main())

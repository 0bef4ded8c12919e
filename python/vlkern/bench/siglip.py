"""`python -m vlkern.bench.siglip`: encoders and a training step of SigLIP beside transformers and timm.

All contestants have the same weights and give the same outputs, which is checked against float64 first. The results are
written and shown like those of an op.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

import vlkern
from vlkern.bench import peers
from vlkern.bench.models import Call, Event, add_arguments, blocks_flops, call_of, run
from vlkern.bench.rivals import RACES
from vlkern.models.siglip import PRESETS, Siglip, SiglipConfig, VisionTower

NAME = "siglip"


def _twins(config: SiglipConfig) -> tuple[Siglip, nn.Module]:
    """Ours and transformers', with the same parameters."""
    ours = Siglip(config)
    theirs: nn.Module = peers.load("transformers").SiglipModel(peers.transformers_config(config))
    theirs.load_state_dict(ours.state_dict(), strict=False)
    return ours, theirs


def _timm(config: SiglipConfig, ours: VisionTower) -> nn.Module:
    """timm's tower with the parameters of `ours`, which get its names one by one."""
    from vlkern.interop import timm as names

    tower, state = peers.timm_tower(config.vision), ours.state_dict()
    found: dict[str, torch.Tensor] = {}
    fused: dict[str, dict[int, torch.Tensor]] = {}
    for name, source in names.sources(config.vision).items():
        value = state[name]
        if len(source.names) == 2:  # q | k | v of the pooling head, stored as q and kv
            width = config.vision.width
            found |= dict(zip(source.names, (value[:width], value[width:]), strict=True))
        elif ".attn.qkv." in source.names[0]:
            order = ("q_proj", "k_proj", "v_proj")
            part = next(i for i, p in enumerate(order) if p in name)
            fused.setdefault(source.names[0], {})[part] = value
        else:
            found[source.names[0]] = value.view(tower.state_dict()[source.names[0]].shape)
    found |= {name: torch.cat([parts[i] for i in range(3)]) for name, parts in fused.items()}
    tower.load_state_dict(found)
    return tower


def image_event(preset: str, batch: int) -> Event:
    """Image encoding up to the pooled vector."""
    config = PRESETS[preset]
    ours, theirs = _twins(config)
    v = config.vision
    pixels = torch.randn(batch, 3, *v.image_size, generator=torch.Generator().manual_seed(0))

    def enter(dtype: torch.dtype) -> dict[str, Callable[[], Call]]:
        return {
            "vlkern": lambda: call_of(ours.vision_model, dtype, [pixels], lambda y: y),
            "transformers": lambda: call_of(theirs.vision_model, dtype, [pixels], lambda y: y.pooler_output),  # type: ignore[arg-type]
            "timm": lambda: call_of(_timm(config, ours.vision_model), dtype, [pixels], lambda y: y),
        }

    patches = 2 * 3 * v.patch**2 * v.width * v.patches
    pooling = 4 * v.width**2 * v.patches + 4 * v.width**2 + 4 * v.width * v.mlp
    flops = batch * (blocks_flops(v, v.patches) + patches + pooling)
    truth = call_of(ours.vision_model, torch.float64, [pixels], lambda y: y)
    return Event(f"{preset} image", list(pixels.shape), "forward", flops, enter, truth)


def text_event(preset: str, batch: int) -> Event:
    """Text encoding up to the projected vector."""
    config = PRESETS[preset]
    ours, theirs = _twins(config)
    t = config.text
    ids = torch.randint(0, t.vocabulary, (batch, t.length), generator=torch.Generator().manual_seed(0))

    def enter(dtype: torch.dtype) -> dict[str, Callable[[], Call]]:
        return {
            "vlkern": lambda: call_of(ours.text_model, dtype, [ids], lambda y: y),
            "transformers": lambda: call_of(theirs.text_model, dtype, [ids], lambda y: y.pooler_output),  # type: ignore[arg-type]
        }

    flops = batch * (blocks_flops(t, t.length) + 2 * t.width * config.vision.width)
    return Event(
        f"{preset} text",
        [batch, t.length],
        "forward",
        flops,
        enter,
        call_of(ours.text_model, torch.float64, [ids], lambda y: y),
    )


def step_event(preset: str, batch: int) -> Event:
    """A training step of both towers: loss, gradients, clipping, AdamW. Its output is the loss before the step."""
    config = PRESETS[preset]
    g = torch.Generator().manual_seed(0)
    pixels = torch.randn(batch, 3, *config.vision.image_size, generator=g)
    ids = torch.randint(0, config.text.vocabulary, (batch, config.text.length), generator=g)
    ours, theirs = _twins(config)

    def step(model: nn.Module, loss: Callable[..., torch.Tensor], dtype: torch.dtype) -> Call:
        model = copy.deepcopy(model).train()
        wide = pixels
        if dtype == torch.float64:
            model, wide = model.double(), pixels.double()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

        def call() -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                image, text = model(wide, ids)
                scale: Any = model.logit_scale
                value = loss(image, text, scale.exp(), model.logit_bias)
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return value.detach()

        return call

    def enter(dtype: torch.dtype) -> dict[str, Callable[[], Call]]:
        rival = next(r for r in RACES["sigmoid_loss"].rivals if r.name == "open_clip")
        return {
            "vlkern": lambda: step(ours, vlkern.ops.sigmoid_contrastive_loss, dtype),
            "transformers, open_clip's loss": lambda: step(_Pair(theirs), rival.make(), dtype),
        }

    v, t = config.vision, config.text
    flops = 3 * batch * (blocks_flops(v, v.patches) + blocks_flops(t, t.length)) + 6 * batch**2 * v.width
    truth = step(ours, vlkern.ops.sigmoid_contrastive_loss, torch.float64)
    return Event(f"{preset} step", list(pixels.shape), "forward+backward", flops, enter, truth)


class _Pair(nn.Module):
    """transformers' SiglipModel as a pair of embeddings: without its own logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.logit_scale, self.logit_bias = model.logit_scale, model.logit_bias

    def forward(self, pixels: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        towers: Any = self.model
        outputs = towers.vision_model(pixels).pooler_output, towers.text_model(ids).pooler_output
        return tuple(nn.functional.normalize(y.float(), dim=-1) for y in outputs)


def main(argv: list[str] | None = None) -> int:
    """Runs the races, prints them and writes <out>/<hardware>/siglip.json with its plots."""
    parser = argparse.ArgumentParser(prog="python -m vlkern.bench.siglip", description=__doc__)
    parser.add_argument("--preset", default="siglip-base-patch16-224", choices=sorted(PRESETS))
    parser.add_argument("--batch", type=int, default=8, help="images, and texts, to encode (default: 8)")
    parser.add_argument("--step-preset", default="siglip-tiny", choices=sorted(PRESETS))
    parser.add_argument("--step-batch", type=int, default=512, help="pairs of a training step (default: 512)")
    add_arguments(parser)
    args = parser.parse_args(argv)
    events = (
        partial(image_event, args.preset, args.batch),
        partial(text_event, args.preset, args.batch),
        partial(step_event, args.step_preset, args.step_batch),
    )
    return run(NAME, parser, args, ("transformers", "timm"), events)


if __name__ == "__main__":
    sys.exit(main())

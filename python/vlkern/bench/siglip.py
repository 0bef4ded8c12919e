"""`python -m vlkern.bench.siglip`: encoders and a training step of SigLIP beside transformers and timm.

All contestants have the same weights and give the same outputs, which is checked against float64 first. The results are
written and shown like those of an op.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import vlkern
from vlkern import models
from vlkern.bench import cli, machine, peers, report, timing
from vlkern.bench.case import DTYPES
from vlkern.bench.oracle import error, tolerance
from vlkern.bench.rivals import RACES, Absent
from vlkern.bench.runner import PATIENCE, SCHEMA, Row
from vlkern.models.siglip import Siglip, SiglipConfig, TowerConfig, VisionTower

NAME = "siglip"
Call = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Event:
    """One race: `enter` makes name -> call for a dtype, `truth` gives the float64 output, `flops` counts one call."""

    sample: str
    shape: list[int]
    mode: str
    flops: float
    enter: Callable[[torch.dtype], dict[str, Callable[[], Call]]]
    truth: Callable[[], torch.Tensor]


def blocks_flops(c: TowerConfig, tokens: int) -> float:
    """Of the blocks for one example: projections and MLP, 2 FLOPs a weight and token, and attention's two products."""
    weights = 4 * c.width**2 + 2 * c.width * c.mlp
    return float(c.depth * (2 * weights * tokens + 4 * tokens**2 * c.width))


def _call(model: nn.Module, dtype: torch.dtype, inputs: torch.Tensor, pick: Callable[[Any], torch.Tensor]) -> Call:
    model = copy.deepcopy(model).to(dtype).eval()
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs

    def call() -> torch.Tensor:
        with torch.inference_mode():
            return pick(model(inputs))

    return call


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
    config = models.siglip.PRESETS[preset]
    ours, theirs = _twins(config)
    v = config.vision
    pixels = torch.randn(batch, 3, *v.image_size, generator=torch.Generator().manual_seed(0))

    def enter(dtype: torch.dtype) -> dict[str, Callable[[], Call]]:
        return {
            "vlkern": lambda: _call(ours.vision_model, dtype, pixels, lambda y: y),
            "transformers": lambda: _call(theirs.vision_model, dtype, pixels, lambda y: y.pooler_output),  # type: ignore[arg-type]
            "timm": lambda: _call(_timm(config, ours.vision_model), dtype, pixels, lambda y: y),
        }

    patches = 2 * 3 * v.patch**2 * v.width * v.patches
    pooling = 4 * v.width**2 * v.patches + 4 * v.width**2 + 4 * v.width * v.mlp
    flops = batch * (blocks_flops(v, v.patches) + patches + pooling)
    truth = _call(ours.vision_model, torch.float64, pixels, lambda y: y)
    return Event(f"{preset} image", list(pixels.shape), "forward", flops, enter, truth)


def text_event(preset: str, batch: int) -> Event:
    """Text encoding up to the projected vector."""
    config = models.siglip.PRESETS[preset]
    ours, theirs = _twins(config)
    t = config.text
    ids = torch.randint(0, t.vocabulary, (batch, t.length), generator=torch.Generator().manual_seed(0))

    def enter(dtype: torch.dtype) -> dict[str, Callable[[], Call]]:
        return {
            "vlkern": lambda: _call(ours.text_model, dtype, ids, lambda y: y),
            "transformers": lambda: _call(theirs.text_model, dtype, ids, lambda y: y.pooler_output),  # type: ignore[arg-type]
        }

    flops = batch * (blocks_flops(t, t.length) + 2 * t.width * config.vision.width)
    return Event(
        f"{preset} text",
        [batch, t.length],
        "forward",
        flops,
        enter,
        _call(ours.text_model, torch.float64, ids, lambda y: y),
    )


def step_event(preset: str, batch: int) -> Event:
    """A training step of both towers: loss, gradients, clipping, AdamW. Its output is the loss before the step."""
    config = models.siglip.PRESETS[preset]
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


def race(event: Event, dtype_name: str, ceilings: dict[str, Any], rounds: int) -> list[Row]:
    """All rows of one event in one dtype."""
    dtype, clock = DTYPES[dtype_name], timing.Clock("cpu")
    label = {"sample": event.sample, "shape": event.shape, "dtype": dtype_name, "mode": event.mode}
    want, rows, calls, errors = event.truth(), {}, {}, {}
    for name, make in event.enter(dtype).items():
        rows[name] = {**label, "contestant": name, "ours": name.startswith("vlkern"), "status": "ok"}
        try:
            call = make()
            off = error(call(), want)
            seconds = 1e-3 * clock(call)
        except Absent as reason:
            rows[name] |= {"status": "absent", "reason": str(reason)}
            continue
        if not off <= tolerance(dtype):
            rows[name] |= {"status": "failed", "reason": f"error {off:.1e}, allowed {tolerance(dtype):.1e}"}
        elif seconds > PATIENCE:
            rows[name] |= {"status": "slow", "reason": f"one call takes {seconds:.0f} s, so it was not raced"}
        else:
            calls[name], errors[name] = call, off
    times = timing.race(calls, clock, rounds)
    rivals = [name for name in calls if not rows[name]["ours"]]
    best = min(rivals, key=lambda n: timing.spread(times[n])["median"], default=None)
    for name, ms in times.items():
        spread = timing.spread(ms)
        rate = 1e-9 * event.flops / spread["median"]
        rows[name] |= {"error": errors[name], "gradient_error": None, "ms": spread, "rounds": len(ms)}
        rows[name] |= {"TFLOPs": rate, "fraction": rate / ceilings["matmul_TFLOPs"][dtype_name], "best_rival": best}
        rows[name]["speedup"] = timing.ratio(times[best], ms) if best else None
    return list(rows.values())


def main(argv: list[str] | None = None) -> int:
    """Runs the races, prints them and writes <out>/<hardware>/siglip.json with its plots."""
    parser = argparse.ArgumentParser(prog="python -m vlkern.bench.siglip", description=__doc__)
    parser.add_argument("--preset", default="siglip-base-patch16-224", choices=sorted(models.siglip.PRESETS))
    parser.add_argument("--batch", type=int, default=8, help="images, and texts, to encode (default: 8)")
    parser.add_argument("--step-preset", default="siglip-tiny", choices=sorted(models.siglip.PRESETS))
    parser.add_argument("--step-batch", type=int, default=512, help="pairs of a training step (default: 512)")
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=("fp32", "bf16"))
    parser.add_argument("--repeats", type=int, default=7, help="rounds, at least (default: 7)")
    parser.add_argument("--malloc", choices=("recycle", "default"), default="recycle", help="as in `vlkern bench`")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), metavar="DIR", help="where results go")
    args = parser.parse_args(argv)
    versions = machine.versions()
    for name in ("transformers", "timm"):
        try:
            versions[name] = peers.load(name).__version__
        except Absent as reason:
            if name == "transformers":  # it gives every event its twin
                parser.error(str(reason))
    torch.manual_seed(0)
    recycle = args.malloc == "recycle"
    ceilings = machine.ceilings("cpu", {name: DTYPES[name] for name in args.dtypes}, recycle=recycle)
    hardware = machine.hardware("cpu")
    hardware["slug"] += "" if recycle else "-default-malloc"
    rows: list[Row] = []
    events = (
        partial(image_event, args.preset, args.batch),
        partial(text_event, args.preset, args.batch),
        partial(step_event, args.step_preset, args.step_batch),
    )
    for make in events:
        event = make()
        for name in args.dtypes:
            print(f"... {event.sample} {name}", file=sys.stderr, flush=True)
            rows += race(event, name, ceilings, args.repeats)
    settings = {"repeats": args.repeats, "device": "cpu", "quick": False}
    result = {
        "schema": SCHEMA, "hardware": hardware, "versions": versions, "settings": settings, "ceilings": ceilings,
        "op": NAME, "ceiling": "matmul", "rows": rows,
    }  # fmt: skip
    print("\n".join(report.machine_lines(result)))
    report.show(result)
    for path in cli.write(result, args.out):
        print(f"wrote {path}")
    return int(any(row["ours"] and row["status"] == "failed" for row in rows))


if __name__ == "__main__":
    sys.exit(main())

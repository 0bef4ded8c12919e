"""`vlkern generate` for models that make pictures: from options to a sheet of pictures in a PNG file."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from vlkern import models
from vlkern._device import device_of
from vlkern._files import check_file, reason, write_file
from vlkern._progress import say
from vlkern.data.images import decode_image
from vlkern.errors import UserError
from vlkern.evaluation.options import whole
from vlkern.models import picture_files
from vlkern.painting import Options, painter_of
from vlkern.painting.sheet import png

#: Pictures unless --count says how many.
COUNT = 16
#: The options of `vlkern generate` that models of pictures have no use for, and those that only they have.
_TEXT = (
    "prompt_tokens", "chat", "max_new_tokens", "stop", "draw", "masks", "top_k", "top_p", "min_p", "cache_dtype",
    "tokenizer", "dtype",
)  # fmt: skip
_PICTURES = ("out", "count", "label", "guidance", "steps")


def add_arguments(parser: argparse.ArgumentParser, real: Any) -> None:
    """What only these models take; `real` parses a number."""
    pictures = parser.add_argument_group("pictures (models of `vlkern train` fsq, vae, maskgit, jet, jetformer, givt)")
    pictures.add_argument("--out", type=Path, metavar="FILE", help="where they go, side by side (.png)")
    pictures.add_argument("--count", type=whole, metavar="N", help=f"how many ({COUNT})")
    pictures.add_argument("--class", dest="label", metavar="NAME", help="of all pictures")
    pictures.add_argument("--guidance", type=real, metavar="W", help="how far away from pictures of no class")
    pictures.add_argument("--steps", type=whole, metavar="N", help="of parallel decoding")


def makes_pictures(folder: Path) -> bool:
    """Whether the folder holds such a model, as its config.json says."""
    try:
        entries = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(entries, dict) and entries.get("model_type") in picture_files.MODELS


def refuse_options(args: argparse.Namespace) -> None:
    """For a model of texts. Raises UserError for an option that only models of pictures take."""
    _refuse(args, _PICTURES, "only for models that make pictures")


def _refuse(args: argparse.Namespace, names: tuple[str, ...], why: str) -> None:
    for name in names:
        if getattr(args, name) not in (None, False, []):
            raise UserError(f"--{'class' if name == 'label' else name.replace('_', '-')}: {why}")


def _image(paths: list[Path], size: int) -> torch.Tensor | None:
    if not paths:
        return None
    if len(paths) > 1:
        raise UserError(f"--image: expected one picture, got {len(paths)}")
    try:
        return decode_image(paths[0].read_bytes(), size)
    except OSError as error:
        raise UserError(f"--image {paths[0]}: cannot read ({reason(error)})") from error
    except ValueError as error:
        raise UserError(f"--image {paths[0]}: {error}") from error


def run(args: argparse.Namespace) -> int:
    """Paint. Raises UserError for everything that the user can mend."""
    _refuse(args, _TEXT, "only for models that write texts")
    if args.repetition_penalty != 1.0:
        raise UserError("--repetition-penalty: only for models that write texts")
    if args.out is None or args.out.suffix.lower() != ".png":
        raise UserError(f"--out: expected the name of a file that ends in .png, got {args.out or 'none'}")
    if args.prompt is not None and len(args.prompt) > 1:
        raise UserError(f"--prompt: expected one text, got {len(args.prompt)}")
    if args.temperature is not None and not 0 <= args.temperature < float("inf"):
        raise UserError(f"--temperature must be at least 0, got {args.temperature}")
    check_file("--out", args.out)
    try:
        model: Any = models.load_pretrained(args.model, dtype=torch.float32)
    except ValueError as error:
        raise UserError(f"--model: {error}") from error
    try:
        painter = painter_of(model)
    except UserError as error:
        raise UserError(f"--model: {error}") from error
    model = model.to(device_of(args.device)).eval()
    generator = torch.Generator()
    generator.manual_seed(args.seed) if args.seed is not None else generator.seed()
    options = Options(
        count=args.count or COUNT, generator=generator, label=args.label,
        prompt=args.prompt[0] if args.prompt else None, image=_image(args.image, model.config.image_size),
        temperature=args.temperature, guidance=args.guidance, steps=args.steps,
    )  # fmt: skip
    start = time.perf_counter()
    with torch.inference_mode():
        pictures = painter.paint(model, args.model, options)
    seconds = time.perf_counter() - start
    write_file(args.out, png(pictures))
    say("wrote", f"{args.out}: {len(pictures)} pictures in {seconds:.2f} s")
    return 0

"""The options of every command that runs a trained model, and the encoder that they ask for."""

import argparse
from pathlib import Path

from vlkern._progress import say
from vlkern.evaluation.encoder import Encoder, load_encoder


def whole(value: str) -> int:
    """For argparse: a whole number above 0."""
    try:
        number = int(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {value!r}") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return number


def add_model(parser: argparse.ArgumentParser) -> None:
    """The options that say which model runs, and how."""
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="RUN/model of a training, or a Hugging Face directory")
    add(
        "--tokenizer", metavar="PATH", help="tokenizer file or folder, or `bytes` (default: the one in the model's DIR)"
    )
    add("--device", metavar="NAME", help="cpu, cuda, ... (default: cuda if there is a GPU)")
    add("--precision", choices=("bf16", "fp32"), help="of the towers (default: bf16 where that is faster)")
    add(
        "--max-patches", type=whole, metavar="N",
        help="most patches of a picture, for NaFlex models (default: as many as positions) and NaViT (default: 256)",
    )  # fmt: skip
    add("--batch", type=whole, default=64, metavar="N", help="pictures or texts embedded at once (default: 64)")


def encoder_of(args: argparse.Namespace) -> Encoder:
    """What these options ask for."""
    bfloat16 = None if args.precision is None else args.precision == "bf16"
    encoder = load_encoder(
        args.model, tokenizer=args.tokenizer, device=args.device, bfloat16=bfloat16, batch=args.batch,
        max_patches=args.max_patches,
    )  # fmt: skip
    say("model", f"{args.model}: {encoder}")
    return encoder

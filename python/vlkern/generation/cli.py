"""`vlkern generate`."""

import argparse
import io
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vlkern import boxes, data, models
from vlkern._device import device_of
from vlkern._files import check_file, reason, write_file
from vlkern.data.images import open_image
from vlkern.data.prompts import Prompt, check_tokenizer
from vlkern.errors import UserError
from vlkern.evaluation.options import whole
from vlkern.generation.generate import Times, generate
from vlkern.generation.prompts import SPARE, prompt_of
from vlkern.generation.sampling import Sampler
from vlkern.generation.stream import check_stops
from vlkern.generation.untrained import numbers_of, random_model
from vlkern.models.gemma import Gemma
from vlkern.models.gemma3 import Gemma3
from vlkern.models.multimodal import Multimodal
from vlkern.models.paligemma import PaliGemma
from vlkern.painting import command as painting

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_CACHES = {"int8": torch.int8}
#: The most tokens of an answer unless --max-new-tokens says how many.
LONGEST = 128


def _real(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {value!r}") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, prompt, sampling, machine."""
    model = parser.add_argument_group("model")
    given = model.add_mutually_exclusive_group(required=True)
    given.add_argument("--model", type=Path, metavar="DIR", help="RUN/model of a training, or a Hugging Face directory")
    given.add_argument("--random-weights", metavar="PRESET", help="a model without a checkpoint, for timing")
    model.add_argument("--tokenizer", metavar="PATH", help="file, folder or `bytes` (that in the model's DIR)")
    prompt = parser.add_argument_group("prompt")
    prompt.add_argument(
        "--prompt", action="append", metavar="TEXT", help='one text, such as "caption en", "detect cat ; dog"'
    )
    prompt.add_argument(
        "--image", type=Path, action="append", default=[], metavar="FILE", help="a picture; may be repeated"
    )
    prompt.add_argument("--chat", action="store_true", help="the prompt is a turn in a talk with a tuned model")
    prompt.add_argument(
        "--prompt-tokens", type=whole, metavar="N", help="with --random-weights, instead: a prompt of N tokens"
    )
    answer = parser.add_argument_group("answer")
    answer.add_argument("--max-new-tokens", type=whole, metavar="N", help="at most (128)")
    answer.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before it; may be repeated")
    answer.add_argument("--draw", type=Path, metavar="FILE", help="write the picture with the answer's boxes (.png)")
    answer.add_argument("--masks", type=Path, metavar="FILE", help="for --draw: the VQ-VAE of <seg> tokens")
    choice = parser.add_argument_group("sampling (without any of these always the most likely token)")
    choice.add_argument(
        "--temperature", type=_real, metavar="T", help="divides the logits (1); of pictures: multiplies the noise"
    )
    choice.add_argument("--top-k", type=whole, metavar="K", help="only the K most likely tokens")
    choice.add_argument(
        "--top-p", type=_real, metavar="P", help="only the most likely ones with probability P together"
    )
    choice.add_argument("--min-p", type=_real, metavar="P", help="only those P times as likely as the most likely one")
    choice.add_argument(
        "--repetition-penalty", type=_real, default=1.0, metavar="X", help="divides the logits of what was said (1)"
    )
    choice.add_argument("--seed", type=int, metavar="N", help="the same answer each time")
    painting.add_arguments(parser, _real)
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", metavar="NAME", help="cpu, cuda, ... (a GPU if there is one)")
    machine.add_argument("--dtype", choices=_DTYPES, help="of the model (that of its files; random: bfloat16)")
    machine.add_argument("--cache-dtype", choices=_CACHES, help="of keys and values (that of the model)")


def _check(args: argparse.Namespace) -> Sampler:
    """What can be said before anything is loaded."""
    if (args.prompt is None) == (args.prompt_tokens is None):
        raise UserError("--prompt: expected a text" + ("" if args.prompt is None else ", or --prompt-tokens, not both"))
    if args.prompt is not None and len(args.prompt) > 1:
        raise UserError(
            f"--prompt: expected one text, got {len(args.prompt)}; vlkern.generation.generate takes several"
        )
    if args.prompt_tokens is not None and (args.random_weights is None or args.image or args.chat):
        raise UserError("--prompt-tokens: only with --random-weights, and without --image and --chat")
    if args.draw is not None:
        if len(args.image) != 1:
            raise UserError(f"--draw: needs one --image, got {len(args.image)}")
        if args.draw.suffix.lower() != ".png":
            raise UserError(f"--draw {args.draw}: expected a name that ends in .png")
        check_file("--draw", args.draw)
    if args.masks is not None and args.draw is None:
        raise UserError("--masks: only with --draw")
    try:
        check_stops(args.stop)
    except ValueError as error:
        raise UserError(f"--{error}") from error
    chosen = (args.temperature, args.top_k, args.top_p, args.min_p, args.seed)
    drawn = 0.0 if all(value is None for value in chosen) else 1.0
    try:
        return Sampler(
            temperature=drawn if args.temperature is None else args.temperature, top_k=args.top_k, top_p=args.top_p,
            min_p=args.min_p, repetition_penalty=args.repetition_penalty, seed=args.seed,
        )  # fmt: skip
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        raise UserError(f"--{name.replace('_', '-')} {rest}") from error


def _model(args: argparse.Namespace) -> Any:
    device = device_of(args.device)
    dtype = _DTYPES[args.dtype] if args.dtype else None
    if args.random_weights is not None:
        return random_model(args.random_weights, dtype=dtype or torch.bfloat16, device=device, seed=args.seed or 0)
    try:
        model: Any = models.load_pretrained(args.model, dtype=dtype)
    except ValueError as error:
        raise UserError(f"--model: {error}") from error
    if not isinstance(model, Gemma | Multimodal):
        raise UserError(f"--model {args.model}: expected a Gemma or a PaliGemma, got {type(model).__name__}")
    return model.to(device)


def _vocabulary(args: argparse.Namespace, model: Any) -> data.Vocabulary:
    if args.random_weights is not None and args.tokenizer is None:
        return numbers_of(model)
    try:
        vocabulary = data.load_vocabulary(args.tokenizer or args.model)
    except data.DataError as error:
        raise UserError(
            f"{error}; give one with --tokenizer" if args.tokenizer is None else f"--tokenizer: {error}"
        ) from error
    if isinstance(model, Multimodal):
        check_tokenizer(vocabulary, model.config)
    elif args.model is not None and abs(vocabulary.size - model.config.vocabulary) >= SPARE:
        raise UserError(
            f"the tokenizer must have about the {model.config.vocabulary} ids of the model, got {vocabulary.size}: "
            "take the tokenizer that belongs to the model"
        )
    return vocabulary


def _read(path: Path) -> Image.Image:
    try:
        return open_image(path.read_bytes())
    except OSError as error:
        raise UserError(f"--image {path}: cannot read ({reason(error)})") from error
    except ValueError as error:
        raise UserError(f"--image {path}: {error}") from error


def _vae(path: Path | None) -> boxes.MaskVae | None:
    try:
        return None if path is None else boxes.load_mask_vae(path)
    except ValueError as error:
        raise UserError(f"--masks {error}") from error


def _prompt(args: argparse.Namespace, model: Any, vocabulary: data.Vocabulary, images: list[Image.Image]) -> Prompt:
    if args.prompt_tokens is not None:
        generator = torch.Generator().manual_seed(args.seed or 0)
        ids = torch.randint(3, data.BytePieces.FIXED, (args.prompt_tokens,), generator=generator)
        return prompt_of(model, ids.tolist(), vocabulary)
    [text] = args.prompt
    if not args.chat:
        return prompt_of(model, text, vocabulary, images)
    if isinstance(model, Gemma3):
        return data.chat_prompt(model.config, vocabulary, [("user", text)], images)
    return prompt_of(model, data.chat_text([("user", text)]), vocabulary, images)


def _draw(path: Path, picture: Image.Image, vae: boxes.MaskVae | None, text: str) -> None:
    """The picture with what the answer says. Names what could not be read."""
    answer = boxes.parse(text)
    for problem in answer.problems:
        print(f"not drawn: {problem}", file=sys.stderr)
    masks = None if vae is None else vae.masks(answer.objects, picture.height, picture.width)
    out = io.BytesIO()
    boxes.draw(picture, answer.objects, masks=masks).save(out, "PNG")
    write_file(path, out.getvalue())
    print(f"wrote {path}: {len(answer.objects)} boxes", file=sys.stderr)


def _stream(row: int, text: str) -> None:
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"the answer cannot be written ({reason(error)})") from error


def _speed(tokens: int, seconds: float) -> str:
    return f"{tokens} tokens in {seconds:.2f} s ({tokens / seconds:.1f} tokens/s)" if seconds else f"{tokens} tokens"


def run(args: argparse.Namespace) -> int:
    """Generate. Raises UserError for everything that the user can mend."""
    if args.model is not None and painting.makes_pictures(args.model):
        return painting.run(args)
    painting.refuse_options(args)
    sampler = _check(args)
    images = [_read(path) for path in args.image]
    vae = _vae(args.masks)
    model = _model(args)
    if args.image and not isinstance(model, Multimodal):
        raise UserError(f"--image: a {type(model).__name__} sees no pictures, got {len(args.image)}")
    if isinstance(model, PaliGemma) and args.prompt is not None and not args.image:
        raise UserError("--image: PaliGemma was trained to speak about pictures, expected at least one, got none")
    vocabulary = _vocabulary(args, model)
    config = model.config.language if isinstance(model, Multimodal) else model.config
    times = Times()
    try:
        prompt = _prompt(args, model, vocabulary, images)
        left = config.context - len(prompt.ids)
        tokens = args.max_new_tokens or min(LONGEST, left)
        if tokens > left or left < 1:
            raise UserError(
                f"--prompt: has {len(prompt.ids)} tokens; with {max(tokens, 1)} more (--max-new-tokens) these are more "
                f"than {config.context}, for which the model was trained"
            )
        [completion] = generate(
            model, [prompt], tokenizer=vocabulary, max_new_tokens=tokens, sampler=sampler, stop=args.stop,
            callback=_stream, cache_dtype=_CACHES[args.cache_dtype] if args.cache_dtype else None, times=times,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(str(error)) from error
    _stream(0, "\n")
    print(f"prefill {_speed(times.prompt, times.prefill)}, decode {_speed(times.steps, times.decode)}", file=sys.stderr)
    if args.draw is not None:
        _draw(args.draw, images[0], vae, completion.text)
    return 0

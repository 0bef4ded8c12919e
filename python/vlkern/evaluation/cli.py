"""`vlkern eval MODEL`."""

import argparse
import difflib
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from vlkern.errors import UserError
from vlkern.evaluation import plots, report, tasks
from vlkern.evaluation.encoder import Embedded, Encoder, load_encoder
from vlkern.evaluation.pictures import FolderPictures, ShardPictures, open_pictures
from vlkern.evaluation.progress import Bar, say
from vlkern.evaluation.zeroshot import TEMPLATES, load_classes, load_templates


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
    add("--batch", type=whole, default=64, metavar="N", help="pictures or texts embedded at once (default: 64)")


def encoder_of(args: argparse.Namespace) -> Encoder:
    """What these options ask for."""
    bfloat16 = None if args.precision is None else args.precision == "bf16"
    encoder = load_encoder(
        args.model, tokenizer=args.tokenizer, device=args.device, bfloat16=bfloat16, batch=args.batch
    )
    say("model", f"{args.model}: {encoder}")
    return encoder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The sub-command `siglip`."""
    families = parser.add_subparsers(dest="family", required=True, metavar="MODEL")
    text = "two-tower models: retrieval, zero-shot classification, retrieval by language"
    siglip = families.add_parser("siglip", help=text, description=f"Evaluate {text}.")
    add_model(siglip)
    add = siglip.add_argument
    add("--data", type=Path, nargs="+", metavar="SHARD", help="WebDataset shards, folders of them, or patterns")
    add("--images", type=Path, metavar="DIR", help="zero-shot on a folder that has a folder for each class")
    add("--k", type=whole, nargs="+", metavar="K", help="of recall@k (default: 1 5 10)")
    add("--caption-key", metavar="KEY", help="where captions are in the .json (default: captions)")
    add("--languages", nargs="+", metavar="LANG", help="retrieval in these languages, or `all`")
    add("--names-key", default="names", metavar="KEY", help="where language -> name is in the .json (default: names)")
    add("--class-key", metavar="KEY", help="zero-shot on --data: where the class is in the .json")
    add("--classes", type=Path, metavar="FILE", help="JSON: class -> name or names (default: classes name themselves)")
    shown = ", ".join(TEMPLATES)
    add("--templates", default="clip_best", metavar="T", help=f"{shown}, or a file, one a line (default: clip_best)")
    add("--retrieval", action="store_true", help="retrieval over captions also with --languages or --class-key")
    add("--out", type=Path, metavar="DIR", help="where results.json, results.md and plots go")


def _check(args: argparse.Namespace) -> None:
    """What can be said before anything is loaded."""
    for option in ("languages", "class_key", "caption_key", "retrieval"):
        if args.images is not None and getattr(args, option):
            raise UserError(f"--{option.replace('_', '-')} needs --data; with --images the folders are the classes")
    if args.classes is not None and args.images is None and args.class_key is None:
        raise UserError("--classes needs --class-key (with --data) or --images")
    args.templates = load_templates(args.templates)
    args.names = load_classes(args.classes) if args.classes else None
    args.retrieval = args.retrieval or not (args.languages or args.class_key or args.images)
    if args.out is not None:
        report.check_folder("--out", args.out)


def _embed(encoder: Encoder, pictures: FolderPictures | ShardPictures) -> Embedded:
    say("data", f"{pictures.place}: {len(pictures)} pictures")
    with Bar("pictures", len(pictures)) as bar:
        found = encoder.pictures(pictures, show=bar.update)
    known = pictures.shards.skipped if isinstance(pictures, ShardPictures) else []
    skipped = [*known, *found.skipped]
    for line in skipped:
        say("", f"left out: {line}")
    return Embedded(found.vectors, found.kept, skipped)


def _ks(given: Sequence[int] | None, pictures: int) -> list[int]:
    """The ks to report: those given must fit, of the usual ones those that do are taken."""
    for k in given or ():
        if k > pictures:
            raise UserError(f"--k {k}: there are only {pictures} pictures")
    return sorted(set(given)) if given else [k for k in (1, 5, 10) if k <= pictures]


def _languages(asked: Sequence[str], present: Sequence[str], key: str) -> list[str]:
    if not present:
        raise UserError(f"--languages: no picture has an object language -> name at {key!r} of its .json (--names-key)")
    if list(asked) == ["all"]:
        return list(present)
    for language in asked:
        if language not in present:
            close = difflib.get_close_matches(language, present, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(present)}"
            raise UserError(f"--languages: no picture has a name in {language!r} ({hint})")
    return list(dict.fromkeys(asked))


def _labels(
    pictures: FolderPictures | ShardPictures, kept: Sequence[int], records: Sequence[dict[str, Any]], key: str | None
) -> list[tuple[str, ...]]:
    """The classes of the pictures that were embedded."""
    if isinstance(pictures, FolderPictures):
        return [(pictures.label(i),) for i in kept]
    assert key is not None
    return [tasks.strings_at(record, key) for record in records]


def run(args: argparse.Namespace) -> int:
    """Evaluate. Raises UserError for everything that the user can mend."""
    _check(args)
    encoder = encoder_of(args)
    key = args.caption_key if args.retrieval else args.names_key if args.languages else args.class_key
    pictures = open_pictures(args.images, args.data, encoder.image_size, resample=encoder.resample, caption_key=key)
    ks = _ks(args.k, len(pictures))
    numbers = range(len(pictures))
    shards = pictures.shards if isinstance(pictures, ShardPictures) else None
    records = [shards.record(i) for i in numbers] if shards and (args.languages or args.class_key) else []
    names = tasks.find_languages(records, args.names_key) if args.languages else {}
    languages = _languages(args.languages, list(names), args.names_key) if args.languages else []
    if args.class_key or args.images:
        labels = _labels(pictures, numbers, records, args.class_key)
        if not any(labels):
            raise UserError(f"--class-key {args.class_key}: no picture has a class there")
        classes = args.names or {label: (label,) for label in sorted(set(chain(*labels)))}
        tasks.numbered(labels, classes)  # that they fit is said before the work

    embedded = _embed(encoder, pictures)
    kept = embedded.kept.tolist()
    results: dict[str, Any] = {
        "schema": 1,
        "model": f"{args.model}: {encoder}",
        "data": pictures.place,
        "pictures": len(kept),
        "skipped": embedded.skipped,
    }
    drawn: list[Any] = []
    if args.retrieval:
        assert shards is not None
        captions = [shards.captions_of(i) for i in kept]
        with Bar("captions", sum(map(len, captions))) as bar:
            found = tasks.retrieve(encoder, embedded.vectors, captions, show=bar.update)
        results["retrieval"] = tasks.retrieval_json(found, ks)
        drawn.append(lambda: plots.retrieval_plot(found))
    if languages:
        results["languages"] = {}
        with Bar("languages", len(languages)) as bar:
            for done, language in enumerate(languages, 1):
                of_kept = [names[language][i] for i in kept]
                if not any(of_kept):
                    raise UserError(f"--languages: no readable picture has a name in {language!r}")
                spoken = tasks.retrieve(encoder, embedded.vectors, of_kept)
                results["languages"][language] = tasks.retrieval_json(spoken, ks)
                bar.update(done)
        drawn.append(lambda: plots.language_plot(results["languages"]))
    if args.class_key or args.images:
        has = [n for n, i in enumerate(kept) if labels[i]]
        with Bar("sentences", sum(map(len, classes.values())) * len(args.templates)) as bar:
            asked = tasks.zero_shot(
                encoder,
                embedded.vectors[torch.tensor(has)],
                [labels[kept[n]] for n in has],
                classes,
                args.templates,
                show=bar.update,
            )
        results["zero_shot"] = tasks.zero_shot_json(asked)
        drawn.append(lambda: plots.zero_shot_plot(results["zero_shot"]))
    report.show(results)
    if args.out is not None:
        written = report.write(results, [file for draw in drawn for file in draw()], args.out)
        say("wrote", f"{args.out}: {', '.join(written)}")
    return 0

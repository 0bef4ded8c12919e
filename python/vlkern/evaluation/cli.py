"""`vlkern eval MODEL`."""

import argparse
import difflib
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from vlkern._files import check_folder
from vlkern._progress import say
from vlkern.errors import UserError
from vlkern.evaluation import paligemma, plots, report, tasks
from vlkern.evaluation.codecs import command as codecs_command
from vlkern.evaluation.encoder import Embedded, Encoder
from vlkern.evaluation.options import add_model, encoder_of, whole
from vlkern.evaluation.pictures import FolderPictures, ShardPictures, open_pictures, require_some
from vlkern.evaluation.progress import Bar
from vlkern.evaluation.zeroshot import TEMPLATES, load_classes, load_templates
from vlkern.painting import evaluation as pictures_command

#: the other kinds of models: modules with add_arguments(parser), run(args) and WHAT they evaluate
_COMMANDS: dict[str, Any] = {"paligemma": paligemma, "pictures": pictures_command, "m2t": codecs_command}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A sub-command for each kind of model."""
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
    for name, command in _COMMANDS.items():
        text = command.WHAT
        command.add_arguments(families.add_parser(name, help=text, description=f"Evaluate {text}."))


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
        check_folder("--out", args.out)


def _embed(encoder: Encoder, pictures: FolderPictures | ShardPictures) -> Embedded:
    say("data", f"{pictures.place}: {len(pictures)} pictures")
    with Bar("pictures", len(pictures)) as bar:
        found = encoder.pictures(pictures, show=bar.update)
    require_some(pictures, len(found.kept), found.skipped)
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


class _Asked:
    """What the pictures are asked for, read from their records; that it fits is known before anything is embedded.

    labels   keys of the classes of each picture; empty without zero-shot
    classes  key -> names
    names    language -> the names of each picture
    """

    def __init__(self, args: argparse.Namespace, pictures: FolderPictures | ShardPictures) -> None:
        self.labels: list[tuple[str, ...]] = []
        self.classes: dict[str, tuple[str, ...]] = {}
        self.names: dict[str, list[tuple[str, ...]]] = {}
        if isinstance(pictures, FolderPictures):
            self.labels = [(pictures.label(i),) for i in range(len(pictures))]
        elif args.languages or args.class_key:
            records = [pictures.shards.record(i) for i in range(len(pictures))]
            if args.languages:
                names = tasks.find_languages(records, args.names_key)
                self.names = {name: names[name] for name in _languages(args.languages, list(names), args.names_key)}
            if args.class_key:
                self.labels = [tasks.strings_at(record, args.class_key) for record in records]
                if not any(self.labels):
                    raise UserError(f"--class-key {args.class_key}: no picture has a class (a string) there")
        if self.labels:
            self.classes = args.names or {label: (label,) for label in sorted(set(chain(*self.labels)))}
            tasks.numbered(self.labels, self.classes)


#: As JSON, and what its plot is drawn from.
Part = tuple[dict[str, Any], Any]


def _retrieval(encoder: Encoder, embedded: Embedded, pictures: ShardPictures, ks: Sequence[int]) -> Part:
    captions = [pictures.shards.captions_of(i) for i in embedded.kept.tolist()]
    with Bar("captions", sum(map(len, captions))) as bar:
        found = tasks.retrieve(encoder, embedded.vectors, captions, show=bar.update)
    return tasks.retrieval_json(found, ks), found


def _by_language(
    encoder: Encoder, embedded: Embedded, names: dict[str, list[tuple[str, ...]]], ks: Sequence[int]
) -> Part:
    results = {}
    with Bar("languages", len(names)) as bar:
        for language, all_names in names.items():
            of_kept = [all_names[i] for i in embedded.kept.tolist()]
            if not any(of_kept):
                raise UserError(f"--languages: no readable picture has a name in {language!r}")
            results[language] = tasks.retrieval_json(tasks.retrieve(encoder, embedded.vectors, of_kept), ks)
            bar.update(len(results))
    return results, results


def _zero_shot(encoder: Encoder, embedded: Embedded, asked: _Asked, templates: Sequence[str]) -> Part:
    labels = [asked.labels[i] for i in embedded.kept.tolist()]
    labelled = [n for n, keys in enumerate(labels) if keys]
    if without := len(labels) - len(labelled):
        say("", f"left out of zero-shot: {without} pictures without a class")
    if not labelled:
        raise UserError("no readable picture has a class")
    with Bar("sentences", sum(map(len, asked.classes.values())) * len(templates)) as bar:
        vectors, right = embedded.vectors[labelled], [labels[n] for n in labelled]
        found = tasks.zero_shot(encoder, vectors, right, asked.classes, templates, show=bar.update)
    result = tasks.zero_shot_json(found)
    return result, result


def run(args: argparse.Namespace) -> int:
    """Evaluate. Raises UserError for everything that the user can mend."""
    if args.family in _COMMANDS:
        return _COMMANDS[args.family].run(args)
    _check(args)
    encoder = encoder_of(args)
    key = args.caption_key if args.retrieval else args.names_key if args.languages else args.class_key
    pictures = open_pictures(args.images, args.data, encoder.image_size, resample=encoder.resample, caption_key=key)
    ks = _ks(args.k, len(pictures))
    asked = _Asked(args, pictures)
    embedded = _embed(encoder, pictures)
    results: dict[str, Any] = {
        "schema": 1,
        "model": f"{args.model}: {encoder}",
        "data": pictures.place,
        "pictures": len(embedded.kept),
        "skipped": embedded.skipped,
    }
    parts: dict[str, Part] = {}
    if args.retrieval and isinstance(pictures, ShardPictures):
        parts["retrieval"] = _retrieval(encoder, embedded, pictures, ks)
    if asked.names:
        parts["languages"] = _by_language(encoder, embedded, asked.names, ks)
    if asked.labels:
        parts["zero_shot"] = _zero_shot(encoder, embedded, asked, args.templates)
    results |= {name: result for name, (result, _) in parts.items()}
    if args.out is not None:
        files = [file for name, (_, subject) in parts.items() for file in plots.DRAW[name](subject)]
        written = report.write(results, files, args.out)
        say("wrote", f"{args.out}: {', '.join(written)}")
    report.show(results)
    return 0

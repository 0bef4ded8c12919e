"""The command line. A command is a module with add_arguments(parser) and run(args) -> status, imported when used."""

import argparse
import difflib
import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

#: command -> (module, what it does)
COMMANDS = {
    "info": ("vlkern.info", "what was built, what this machine offers, and which backends each op has here"),
    "demo": ("vlkern.demo.cli", "train a small SigLIP on real pictures and search them"),
    "train": ("vlkern.train.cli", "train a model on pictures, texts or classes, on one process or under torchrun"),
    "eval": ("vlkern.evaluation.cli", "measure a trained model: retrieval, classification, languages, made pictures"),
    "generate": ("vlkern.generation.cli", "answer a prompt about pictures, continue a text, or make pictures"),
    "search": ("vlkern.search.cli", "find pictures by words"),
    "compress": ("vlkern.codec.command_compress", "write a picture to a small file"),
    "decompress": ("vlkern.codec.command_decompress", "turn such a file into a picture again"),
    "inspect": ("vlkern.codec.command_inspect", "say what such a file holds, and where its bits went"),
    "bench": ("vlkern.bench.cli", "compare every op with its rivals"),
}


#: What a print to a file on a full disk can end with.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class _Parser(argparse.ArgumentParser):
    """Reports an error as one line, without the usage; and does not keep quiet when its help cannot be written."""

    def _print_message(self, message: str, file: Any = None) -> None:
        print(message, end="", file=file)

    def error(self, message: str) -> NoReturn:
        _fail(message)


def _fail(message: str) -> NoReturn:
    print(f"vlkern: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def _version() -> str:
    import torch

    import vlkern

    return f"vlkern {vlkern.__version__} (torch {torch.__version__})"


def _top() -> argparse.ArgumentParser:
    lines = [f"  {name:<12}{text}" for name, (_, text) in COMMANDS.items()]
    parser = _Parser(
        prog="vlkern",
        usage="vlkern [--help] [--version] COMMAND [OPTIONS]",
        description="Compiled kernels for vision-language models in PyTorch.",
        epilog="\n".join(["commands:", *lines, "", "`vlkern COMMAND --help` lists the options of a command."]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=_version())
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def _run(argv: Sequence[str] | None) -> int:
    top = _top()
    args = top.parse_args(argv)
    if args.command is None:
        top.print_help()
        return 0
    if args.command not in COMMANDS:
        close = difflib.get_close_matches(args.command, COMMANDS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"the commands are {', '.join(COMMANDS)}"
        _fail(f"unknown command {args.command!r} ({hint})")
    name, text = COMMANDS[args.command]
    try:
        module = import_module(name)
    except ModuleNotFoundError as missing:
        if missing.name and missing.name.partition(".")[0] != "vlkern":
            _fail(f"`vlkern {args.command}` needs {missing.name}: pip install 'vlkern[{args.command}]'")
        raise
    parser = _Parser(prog=f"vlkern {args.command}", description=f"{text[0].upper()}{text[1:]}.")
    module.add_arguments(parser)
    status: int = module.run(parser.parse_args(args.rest))
    return status


def _flush() -> None:
    """Here there is somebody to say that it failed. A closed standard output is None, which `print` puts up with."""
    print(end="", flush=True)


def _mute() -> None:
    """The interpreter's flush of standard output at exit must not complain again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit status; an error of the user's is one line on stderr and exit status 2."""
    from vlkern.errors import UserError

    try:
        try:
            status = _run(argv)
        except SystemExit:  # --help
            _flush()
            raise
        _flush()
        return status
    except UserError as error:
        _fail(str(error))
    except BrokenPipeError:
        _mute()  # the reader has gone: `vlkern info | head`
        return 1
    except OSError as error:
        if error.filename is not None or error.errno not in _FULL:
            raise
        _mute()
        _fail(f"standard output: cannot be written ({error.strerror})")
    except KeyboardInterrupt:
        print("vlkern: interrupted", file=sys.stderr)
        return 130

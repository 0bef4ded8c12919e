"""The console command `vlkern`. It lies beside the package, whose import loads PyTorch and takes seconds."""

import sys


def main() -> int:
    """Run one command: see vlkern.cli.main. Ctrl-C ends it with one line and status 130 from the first moment on."""
    try:
        from vlkern.cli import main as run

        return run()
    except KeyboardInterrupt:
        print("vlkern: interrupted", file=sys.stderr)
        return 130

"""Triton reads TRITON_INTERPRET when it is imported, so its interpreter has a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from rooms import ROOT

pytest.importorskip("triton", reason="Triton is optional")


def test_kernels_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", Path(__file__).with_name("interpreter.py")],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout

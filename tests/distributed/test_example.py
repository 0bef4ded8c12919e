"""The example of docs/distributed.md, run as torchrun runs it."""

import os
import re
import sys
from pathlib import Path

import forks
import torch
from rooms import ROOT


def _rank(rank: int, port: int, code: str, output: str) -> None:
    forks.become(rank, 2, port, output)
    torch.set_num_threads(1)
    exec(compile(code, "docs/distributed.md", "exec"), {"__name__": "__main__"})
    sys.stdout.flush()
    # At exit, after everything is done, about one process in a hundred aborts ("terminate called without an active
    # exception"): so does a script with DistributedDataParallel and gloo that does not import this library (2 x 25
    # starts, PyTorch 2.11). The test is about the example, so it leaves before that.
    os._exit(0)


def test_example_of_the_documentation_trains(tmp_path):
    code = re.search(r"```python torchrun\n(.*?)```", (ROOT / "docs/distributed.md").read_text(), re.DOTALL).group(1)
    port, output = forks.free_port(), str(tmp_path / "said")
    ranks = [forks.context().Process(target=_rank, args=(rank, port, code, output), daemon=True) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    said = Path(f"{output}.0").read_text()
    assert [process.exitcode for process in ranks] == [0, 0], said + Path(f"{output}.1").read_text()
    losses = [float(line.split()[-1]) for line in said.splitlines() if line.startswith("step")]
    assert len(losses) == 5 and losses[-1] < losses[0]

"""The example of docs/distributed.md, run as it says."""

import os
import re
import subprocess
import sys

from rooms import ROOT


def test_example_of_the_documentation_trains(tmp_path):
    code = re.search(r"```python torchrun\n(.*?)```", (ROOT / "docs/distributed.md").read_text(), re.DOTALL).group(1)
    script = tmp_path / "train.py"
    # At exit, after everything is done, about one process in a hundred aborts ("terminate called without an active
    # exception"): so does a script with DistributedDataParallel and gloo that does not import this library (2 x 25
    # starts, PyTorch 2.11). The test is about the example, so it leaves before that.
    script.write_text(code + "\nimport os, sys\nsys.stdout.flush()\nos._exit(0)\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    output = subprocess.run(torchrun, capture_output=True, text=True, timeout=120, env=environment)
    assert output.returncode == 0, output.stderr
    losses = [float(line.split()[-1]) for line in output.stdout.splitlines() if line.startswith("step")]
    assert len(losses) == 5 and losses[-1] < losses[0]

"""The example of docs/distributed.md, run as it says."""

import os
import re
import subprocess
import sys

from rooms import ROOT


def test_example_of_the_documentation_trains(tmp_path):
    code = re.search(r"```python torchrun\n(.*?)```", (ROOT / "docs/distributed.md").read_text(), re.DOTALL).group(1)
    script = tmp_path / "train.py"
    script.write_text(code)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    output = subprocess.run(torchrun, capture_output=True, text=True, timeout=120, env=environment)
    assert output.returncode == 0, output.stderr
    losses = [float(line.split()[-1]) for line in output.stdout.splitlines() if line.startswith("step")]
    assert len(losses) == 5 and losses[-1] < losses[0]

"""vlkern: compiled kernels for vision-language models in PyTorch.

`vlkern.ops` holds the ops, `vlkern.models` the models built from them; `vlkern.backend(...)` chooses how they run and
`vlkern.explain(op, *args)` says what would run and why.
"""

from pathlib import Path

from vlkern import ops
from vlkern.backends import apply_environment, backend, explain, validate

__version__ = (Path(__file__).parent / "version.txt").read_text().strip()
__all__ = ["__version__", "backend", "explain", "ops", "validate"]

apply_environment()

"""One folder per op. In a checkout the folders lie in kernels/ at the top level; in a wheel, here."""

from pathlib import Path

__path__.append(str(Path(__file__).parents[3] / "kernels"))

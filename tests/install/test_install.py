"""The wheel, alone in a clean environment and run from another directory, is the whole package."""

import sysconfig
import zipfile
from pathlib import Path

import pytest
from rooms import ROOT
from sandbox import run

from vlkern._op import REGISTRY

EXTENSION = sysconfig.get_config_var("EXT_SUFFIX")
pytestmark = pytest.mark.slow

# Runs in the clean environment. Numbers cannot tell whose kernel ran, so the memory map says which library is loaded.
CHECK = """
import sys
from pathlib import Path
import torch, vlkern
from vlkern._op import REGISTRY
from vlkern import codec
from vlkern.data import clipart_mini, photos
from vlkern.packing import pack

package = Path(vlkern.__file__).parent
assert package.is_relative_to(sys.prefix), package
mapped = {Path(line.split()[-1]) for line in open("/proc/self/maps") if "/" in line}
assert package / "_C.so" in mapped, "the wheel's _C.so is not loaded"
assert pack([5, 3, 4, 2], 8).bins == 2
assert codec.load().exactness == ("integer",)
assert all(found.is_relative_to(package) for found in (clipart_mini(), photos()))
assert Path(sys.modules["vlkern._host"].__file__).parent == package
assert set(REGISTRY) == set(sys.argv[1:]), set(REGISTRY)
for name, op in REGISTRY.items():
    assert Path(sys.modules[f"vlkern.kernels.{name}"].__file__).is_relative_to(package)
    if "cpu" in op.backends:
        assert op.missing["cpu"] is None, op.missing["cpu"]
x, w = torch.randn(4, 33), torch.randn(33)
with vlkern.backend("cpu"):
    y = vlkern.ops.rms_norm(x, w)
with vlkern.backend("reference"):
    torch.testing.assert_close(y, vlkern.ops.rms_norm(x, w))
"""


def test_the_wheel_holds_the_whole_package_and_nothing_else(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    python = {path.relative_to(ROOT / "python") for path in (ROOT / "python").rglob("*.py")}
    rooms = {Path("vlkern") / path.relative_to(ROOT) for path in (ROOT / "kernels").rglob("*.py")}
    pictures = {Path("vlkern/clipart_mini") / name for name in ("README.md", "train.tar", "test.tar")}
    photos = {"vlkern" / path.relative_to(ROOT / "data") for path in (ROOT / "data/photos").rglob("*.*")}
    weights = {path.relative_to(ROOT / "python") for path in (ROOT / "python/vlkern/codec/weights").rglob("*.*")}
    rest = {Path("vlkern") / name for name in ("py.typed", "version.txt", "_C.so", "_host" + EXTENSION)}
    assert held == {str(path) for path in python | rooms | pictures | photos | weights | rest}


def test_the_wheel_works_from_another_directory(installed: Path, tmp_path: Path) -> None:
    """And finds its pictures."""
    rooms = [path.parent.name for path in ROOT.glob("kernels/*/__init__.py")]
    run(installed / "bin" / "python", "-c", CHECK, *rooms, cwd=tmp_path, sanitized=True)


def test_the_command_works(installed: Path, tmp_path: Path) -> None:
    said = run(installed / "bin" / "vlkern", "info", cwd=tmp_path, sanitized=True)
    lines = [line.split() for line in said.splitlines()]
    assert ["_C", "yes"] in lines and ["_host", "yes"] in lines
    assert all([op.public] in lines for op in REGISTRY.values())

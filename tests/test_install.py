"""The wheel, alone in a clean environment and run from another directory, is the whole package."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from vlkern._op import REGISTRY

ROOT = Path(__file__).parents[1]
EXTENSION = sysconfig.get_config_var("EXT_SUFFIX")
pytestmark = pytest.mark.slow

# Runs in the clean environment. Numbers cannot tell whose kernel ran, so the memory map says which library is loaded.
CHECK = """
import sys
from pathlib import Path
import torch, vlkern
from vlkern._op import REGISTRY
from vlkern.packing import pack

package = Path(vlkern.__file__).parent
assert package.is_relative_to(sys.prefix), package
mapped = {Path(line.split()[-1]) for line in open("/proc/self/maps") if "/" in line}
assert package / "_C.so" in mapped, "the wheel's _C.so is not loaded"
assert pack([5, 3, 4, 2], 8).bins == 2
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


def run(*command: object, cwd: Path, **environment: str) -> str:
    hidden = {"PYTHONPATH", "VLKERN_BACKEND", "TRITON_INTERPRET"}
    base = {key: value for key, value in os.environ.items() if key not in hidden}
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**base, **environment}, capture_output=True, text=True
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, so that the checkout's own build stays as it is, and without optimisation, as
    CMake builds a type that it does not know: in a fifth of the time."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("csrc", "data", "kernels", "python"):
        shutil.copytree(
            ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__")
        )
    for name in ("CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, folder / "source")
    pip = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", folder)
    run(*pip, folder / "source", cwd=folder, VLKERN_CUDA="off", CMAKE_BUILD_TYPE="plain")
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel. Its dependencies are borrowed from this one by path, which leaves out the
    start-up hooks of an editable install."""
    folder = tmp_path_factory.mktemp("clean")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "borrowed.pth").write_text("\n".join(sorted(borrowed)))
    return folder


def test_the_wheel_holds_the_whole_package_and_nothing_else(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    python = {path.relative_to(ROOT / "python") for path in (ROOT / "python").rglob("*.py")}
    rooms = {Path("vlkern") / path.relative_to(ROOT) for path in (ROOT / "kernels").rglob("*.py")}
    pictures = {Path("vlkern/clipart_mini") / name for name in ("README.md", "train.tar", "test.tar")}
    photos = {"vlkern" / path.relative_to(ROOT / "data") for path in (ROOT / "data/photos").rglob("*.*")}
    rest = {Path("vlkern") / name for name in ("py.typed", "version.txt", "_C.so", "_host" + EXTENSION)}
    assert held == {str(path) for path in python | rooms | pictures | photos | rest}


def test_the_wheel_works_from_another_directory(installed: Path, tmp_path: Path) -> None:
    rooms = [path.parent.name for path in ROOT.glob("kernels/*/__init__.py")]
    run(installed / "bin" / "python", "-c", CHECK, *rooms, cwd=tmp_path)


def test_the_command_works(installed: Path, tmp_path: Path) -> None:
    said = run(installed / "bin" / "vlkern", "info", cwd=tmp_path)
    lines = [line.split() for line in said.splitlines()]
    assert ["_C", "yes"] in lines and ["_host", "yes"] in lines
    assert all([op.public] in lines for op in REGISTRY.values())


def test_the_pictures_of_the_demo_are_found(installed: Path, tmp_path: Path) -> None:
    code = "from vlkern.data import clipart_mini; print(clipart_mini())"
    assert Path(run(installed / "bin" / "python", "-c", code, cwd=tmp_path).strip()).is_relative_to(installed)

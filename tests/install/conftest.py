"""The wheel and an environment that has it. Built once, and with the sanitizers: whatever runs it is watched."""

import shutil
import sys
import sysconfig
from pathlib import Path

import pytest
from rooms import ROOT
from sandbox import COMPILER, SANITIZERS, run


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, so that the checkout's own build stays as it is, and without optimisation, as
    CMake builds a type that it does not know: in a fifth of the time."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("csrc", "data", "kernels", "python"):
        shutil.copytree(
            ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__")
        )
    for name in ("LICENSE", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, folder / "source")
    settings, default = (ROOT / "CMakeLists.txt").read_text(), 'set(VLKERN_SANITIZE ""'
    assert settings.count(default) == 1
    (folder / "source/CMakeLists.txt").write_text(settings.replace(default, f'set(VLKERN_SANITIZE "{SANITIZERS}"'))
    pip = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", folder)
    choices = {"VLKERN_CUDA": "off", "CMAKE_BUILD_TYPE": "plain"} | ({"CXX": COMPILER} if COMPILER else {})
    run(*pip, folder / "source", cwd=folder, env=choices)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="session")
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

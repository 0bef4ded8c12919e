"""Builds vlkern: setuptools packs the Python files, CMake (ninja) builds the three native libraries.

_C       CPU kernels, PyTorch's stable ABI, loaded with torch.ops.load_library
_C_cuda  CUDA kernels, likewise; built when nvcc is found (VLKERN_CUDA=auto|on|off)
_host    tensor-free C++ bound with pybind11
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def torch_root() -> Path:
    """PyTorch's folder. Only headers and libraries are used, so an isolated build borrows the interpreter's copy."""
    spec = importlib.util.find_spec("torch")
    if spec and spec.origin:
        return Path(spec.origin).parent
    for scheme in ("purelib", "platlib"):
        candidate = Path(sysconfig.get_paths()[scheme]) / "torch"
        if (candidate / "include").is_dir():
            return candidate
    sys.exit("vlkern needs PyTorch >= 2.11 to build: install torch first, or build with --no-build-isolation")


class CMakeBuild(build_ext):
    """Runs CMake once; every library lands beside the package's Python files."""

    def run(self) -> None:
        package = Path(self.get_ext_fullpath("vlkern._host")).parent.resolve()
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        package.mkdir(parents=True, exist_ok=True)
        # The tools of this environment come first: its bin folder is not on PATH when the environment is not activated.
        tools = {**os.environ, "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])}
        cmake, ninja = (shutil.which(tool, path=tools["PATH"]) for tool in ("cmake", "ninja"))
        if not cmake:
            sys.exit("vlkern needs CMake >= 3.24 to build its native code: pip install cmake ninja")
        # Ninja's path is given every time: an isolated build leaves one behind that no longer exists.
        generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
        configure = [
            cmake, "-S", str(ROOT), "-B", str(build), *generator,
            f"-DVLKERN_TORCH={torch_root()}",
            f"-DVLKERN_CUDA={os.environ.get('VLKERN_CUDA', 'auto')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DVLKERN_PACKAGE={package}",
        ]  # fmt: skip
        subprocess.run(configure, check=True, env=tools)
        subprocess.run([cmake, "--build", str(build), "--parallel", str(os.cpu_count())], check=True, env=tools)
        subprocess.run([cmake, "--install", str(build)], check=True, env=tools)


kernels = {f"vlkern.kernels.{op}": f"kernels/{op}" for op in find_packages("kernels")}
setup(
    version=(ROOT / "python/vlkern/version.txt").read_text().strip(),
    license="Apache-2.0",  # here and not in pyproject.toml, whose notation changed with setuptools 77
    packages=[*find_packages("python"), *kernels, "vlkern.clipart_mini", "vlkern.photos", "vlkern.photos.eval"],
    py_modules=["vlkern_command"],
    package_dir={
        "": "python",
        "vlkern.clipart_mini": "data/clipart-mini",
        "vlkern.photos": "data/photos",
        "vlkern.photos.eval": "data/photos/eval",
        **kernels,
    },
    package_data={
        "vlkern": ["version.txt", "py.typed"],
        "vlkern.codec": ["weights/README.md", "weights/*/*"],
        "vlkern.clipart_mini": ["*.tar", "README.md"],
        "vlkern.photos": ["*.tar", "README.md"],
        "vlkern.photos.eval": ["*.webp"],
    },
    ext_modules=[Extension("vlkern._host", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)

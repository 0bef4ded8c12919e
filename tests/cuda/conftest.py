"""The rooms on the emulated GPU, compiled once for all tests."""

import pytest
from emulation import Emulator
from rooms import ROOT


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    return Emulator(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(scope="session")
def emulated(emulator: Emulator) -> None:
    """Every room with a kernel for CUDA."""
    for path in ROOT.glob("kernels/*/cuda.cu"):
        name, code = path.parent.name, path.read_text()
        if name == "sigmoid_loss":
            assert "kSide = 5760;" in code
            code = code.replace("kSide = 5760;", "kSide = 2176;")  # several tiles are 18 million pairs less
        copy = emulator.folder / f"{name}.cu"
        copy.write_text(code)
        emulator.load(copy, name, path.parent)

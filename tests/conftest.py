"""Shared by all tests."""

import pytest
import torch
from hypothesis import settings
from rooms import KERNELS, device

# Time says nothing here: two halves of the tests share two cores, and a first example may compile.
settings.register_profile("vlkern", deadline=None)
settings.load_profile("vlkern")


def pytest_report_header() -> str:
    where = ", ".join(f"{name} on {device(name)}" for name in KERNELS)
    return f"vlkern: torch {torch.__version__}, kernels under test: {where}"


@pytest.fixture(autouse=True)
def _no_choice_leaks():
    """A test that leaves a backend chosen would silently change what the next one runs."""
    from vlkern._op import REGISTRY

    before = {name: op.forced for name, op in REGISTRY.items()}
    yield
    assert {name: op.forced for name, op in REGISTRY.items()} == before


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> str:
    """Every backend under test here, one after the other."""
    return request.param

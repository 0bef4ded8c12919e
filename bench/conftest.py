import pytest

from vlkern.bench import machine, timing


@pytest.fixture(scope="session", autouse=True)
def _recycled_memory() -> None:
    """The same setting as `vlkern bench`; see docs/benchmarks.md."""
    timing.recycle_memory()


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, object]) -> None:
    machine_info["vlkern"] = {**machine.hardware("cpu"), **machine.versions()}

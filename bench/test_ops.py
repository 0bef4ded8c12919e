"""`pytest bench/`: a small set of the contestants of `vlkern bench`, checked, then timed by pytest-benchmark."""

from typing import Any

import pytest
import torch

from vlkern.bench.case import Case, Inputs, modes_of, samples_of
from vlkern.bench.oracle import errors, truth
from vlkern.bench.rivals import Absent, Contestant

CASES = [
    Case("rms_norm", next(s for s in samples_of("rms_norm").SAMPLES if s.bench), torch.float32),
    Case(
        "sigmoid_loss", next(s for s in samples_of("sigmoid_loss").SAMPLES if s.name == "several_chunks"), torch.float32
    ),
]
ENTERED = [(case, c) for case in CASES for c in case.contestants(case.inputs())[0]]


@pytest.fixture(scope="module")
def truths() -> dict[Case, tuple[Inputs, list[torch.Tensor]]]:
    return {case: (inputs := case.inputs(), truth(case, inputs)) for case in CASES}


@pytest.mark.parametrize("mode", modes_of("rms_norm"))
@pytest.mark.parametrize(("case", "contestant"), ENTERED, ids=[f"{a.op}-{b.name}" for a, b in ENTERED])
def test_op(case: Case, contestant: Contestant, mode: str, truths: Any, benchmark: Any) -> None:
    try:
        function = contestant.make()
    except Absent as reason:
        pytest.skip(str(reason))
    inputs, want = truths[case]
    errors(case, inputs, want, function, mode)
    benchmark.group = f"{case.op} {case.sample.name} {case.dtype_name} {mode}"
    benchmark(inputs.run, function, mode)

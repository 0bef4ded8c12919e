"""No kernel spills registers or uses a stack that it did not use before, on any chip."""

import pytest
from resources import TABLE, Row, built, committed, sources
from rooms import ROOT

REFRESH = f"if that is meant: python tests/cuda/resources.py --update (writes {TABLE.relative_to(ROOT)})"


def complaints(fresh: list[Row], known: list[Row]) -> list[str]:
    before = {(row.kernel, row.arch): row for row in known}
    now = {(row.kernel, row.arch) for row in fresh}
    found = [f"{kernel} for {arch} is in the table but was not compiled" for kernel, arch in before.keys() - now]
    for row in fresh:
        old = before.get((row.kernel, row.arch))
        if old is None:
            found.append(f"{row.kernel} for {row.arch} is not in the table")
            continue
        for what in ("spill_bytes", "stack_bytes"):
            if getattr(row, what) > getattr(old, what):
                found.append(f"{row.kernel} for {row.arch}: {what} {getattr(row, what)}, was {getattr(old, what)}")
    return sorted(found)


def test_no_kernel_spills_that_did_not_before():
    """On the chips that the build of this checkout is for."""
    if not (fresh := built()):
        pytest.skip("nothing was compiled for CUDA here")
    chips = {row.arch for row in fresh}
    found = complaints(fresh, [row for row in committed() if row.arch in chips])
    assert not found, "\n".join([*found, REFRESH])


def test_the_table_covers_every_file_and_chip():
    assert {row.kernel.split("/")[0] for row in committed()} == sources().keys()
    assert {row.arch for row in committed()} == {"sm_80", "sm_90a", "sm_100a"}


def test_complaints_are_made():
    row = Row("room/kernel", "sm_90a", 32, 0, 0, 0)
    assert complaints([row], [row]) == []
    assert "not in the table" in complaints([row], [])[0]
    assert "was not compiled" in complaints([], [row])[0]
    assert "spill_bytes 8, was 0" in complaints([Row("room/kernel", "sm_90a", 32, 8, 0, 0)], [row])[0]
    assert "stack_bytes 16, was 0" in complaints([Row("room/kernel", "sm_90a", 32, 0, 16, 0)], [row])[0]

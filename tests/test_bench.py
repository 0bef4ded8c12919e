"""The benchmark itself: it rejects wrong contestants, weighs memory, and its files and tables agree."""

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import vlkern
from vlkern.bench import cli, gemma, machine, memory, naflex, oracle, rivals, runner, siglip, table, timing
from vlkern.bench.case import Case, modes_of, samples_of
from vlkern.bench.rivals import Absent, Contestant

MIB = 2**20
MODES = modes_of("rms_norm")
CEILINGS = {"copy_GBps": {"copy": 1.0, "clone": 1.0}, "matmul_TFLOPs": {"fp32": 1.0}}


def case(op: str, sample: str, dtype: torch.dtype = torch.float32) -> Case:
    return Case(op, next(s for s in samples_of(op).SAMPLES if s.name == sample), dtype)


def made(function: Any) -> Any:
    return function


def wrong_value(x: torch.Tensor, weight: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return 1.01 * rivals.rms_norm_formula(x, weight, **kwargs)


def wrong_gradient(x: torch.Tensor, weight: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return rivals.rms_norm_formula(x, weight.detach(), **kwargs) + 0 * weight


def nan_value(x: torch.Tensor, weight: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return rivals.rms_norm_formula(x, weight, **kwargs) * float("nan")


def crashing(x: torch.Tensor, weight: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    raise RuntimeError("no such kernel")


def hungry(x: torch.Tensor, weight: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    scratch = torch.ones(64 * MIB // 4)
    return rivals.rms_norm_formula(x, weight, **kwargs) + scratch[0] - 1


def absent() -> Any:
    raise Absent("not today")


@pytest.fixture(scope="module")
def clock() -> timing.Clock:
    return timing.Clock("cpu", cold=False)


def rows_of(contestants: list[Contestant], clock: timing.Clock, memory: bool = False) -> list[dict[str, Any]]:
    settings = runner.Settings(("rms_norm",), repeats=2, memory=memory)
    ceilings = {"matmul_TFLOPs": {"fp32": 1.0}}
    one = case("rms_norm", "above_a_block")
    return runner.run_case(one, settings, ceilings, clock, lambda text: None, contestants)


@pytest.mark.parametrize(
    ("function", "modes", "reason"),
    [
        (wrong_value, MODES, "error 1.0e-02 against the reference"),
        (wrong_gradient, MODES[1:], "wrong gradient 1"),
        (nan_value, MODES, "error nan against the reference"),
        (crashing, MODES, "no such kernel"),
    ],
)
def test_a_wrong_contestant_is_reported_and_not_timed(
    function: Any, modes: tuple[str, ...], reason: str, clock: timing.Clock
) -> None:
    right = Contestant("right", partial(made, rivals.rms_norm_formula))
    rows = rows_of([Contestant("wrong", partial(made, function)), right], clock)
    failed = [row for row in rows if row["status"] == "failed"]
    assert [row["mode"] for row in failed] == list(modes)
    assert all(row["contestant"] == "wrong" and reason in row["reason"] and "ms" not in row for row in failed)
    assert [row["mode"] for row in rows if row["contestant"] == "right" and row["ms"]["median"] > 0] == list(MODES)


def test_an_absent_contestant_is_reported_with_its_reason(clock: timing.Clock) -> None:
    rows = rows_of([Contestant("gone", absent)], clock)
    assert [(row["contestant"], row["status"], row["reason"]) for row in rows] == [("gone", "absent", "not today")]


def test_speedup_is_the_best_rivals_time_over_ours(clock: timing.Clock) -> None:
    ours = Contestant("vlkern reference", partial(made, rivals.rms_norm_formula), ours=True)
    slow = Contestant("slow", partial(made, rivals.torch_rms_norm))
    fast = Contestant("fast", partial(made, rivals.rms_norm_formula))
    for row in rows_of([ours, slow, fast], clock):
        assert row["best_rival"] in ("slow", "fast")
        if row["contestant"] == row["best_rival"]:
            assert row["speedup"] == {"median": 1.0, "q1": 1.0, "q3": 1.0}
    assert timing.ratio([2.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == {"median": 2.0, "q1": 2.0, "q3": 2.5}


@pytest.mark.parametrize("op", list(rivals.RACES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_rival_computes_the_op(op: str, dtype: torch.dtype) -> None:
    names = [sample.name for sample in samples_of(op).SAMPLES if not sample.bench]
    one = case(op, "above_a_tile" if "above_a_tile" in names else names[-1], dtype)
    inputs = one.inputs()
    want = oracle.truth(one, inputs)
    checked = 0
    for rival in rivals.RACES[op].rivals:
        if rival.compiled:
            continue  # the same formula as eager; `vlkern bench` checks it at full size
        try:
            function = rival.make()
        except Absent:
            continue
        for mode in modes_of(one.op):
            oracle.errors(one, inputs, want, function, mode)
        checked += 1
    assert checked >= 1


def test_the_blockwise_truth_is_the_reference() -> None:
    inputs = case("sigmoid_loss", "several_chunks").inputs().to(torch.float64)
    with vlkern.backend("reference"):
        want = inputs.run(vlkern.ops.sigmoid_contrastive_loss, "forward+backward")
    for a, b in zip(oracle._sigmoid_loss_in_blocks(inputs), want, strict=True):
        torch.testing.assert_close(a, b)


def test_memory_counts_a_contestants_scratch() -> None:
    one = case("rms_norm", "gemma3_270m")
    plain, extra = (
        memory.extra_memory(one, Contestant("c", partial(made, f)), MODES) for f in (rivals.rms_norm_formula, hungry)
    )
    assert 62 * MIB < extra["forward"] - plain["forward"] < 66 * MIB
    assert (
        extra["forward+backward"] > 64 * MIB > 32 * MIB > plain["forward+backward"]
    )  # it is freed before the backward


def test_memory_says_when_the_process_dies() -> None:
    with pytest.raises(RuntimeError, match="no such kernel"):
        memory.extra_memory(case("rms_norm", "one"), Contestant("c", partial(made, crashing)), MODES)


def parsed(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return parser.parse_args(argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["rmsnorm"], f"op must be one of {', '.join(rivals.RACES)}"),
        (["rms_norm", "--samples", "nope"], "sample must be one of empty, one"),
        (["--dtypes", "int8"], "dtype must be one of fp32, bf16, fp16, got 'int8'"),
        (["--device", "tpu"], "device must be one of cpu, cuda, got 'tpu'"),
        (["--repeats", "0"], "repeats must be at least 1, got 0"),
    ],
)
def test_bad_options_are_one_line_and_exit_2(argv: list[str], message: str, capsys: Any) -> None:
    assert cli.run(parsed(*argv)) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and not captured.out


def test_cuda_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device cuda was chosen"):
        runner.settings(device="cuda")


def test_public_names_are_accepted() -> None:
    assert runner.settings(["sigmoid_contrastive_loss"]).ops == ("sigmoid_loss",)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a README and the results of a tiny quick run."""
    root = tmp_path_factory.mktemp("repository")
    (root / "docs").mkdir()
    (root / "README.md").write_text(f"# a\n\n{table.START}\nold\n{table.END}\n\nb\n")
    argv = ["rms_norm", "--quick", "--samples", "above_a_block", "--dtypes", "fp32", "--device", "cpu"]
    assert cli.run(parsed(*argv, "--out", str(root / "bench/results"))) == 0
    return root


def test_results_follow_the_schema(repository: Path) -> None:
    (path,) = (repository / "bench/results").glob("*/rms_norm.json")
    result = json.loads(path.read_text())
    assert set(result) == {
        "schema", "hardware", "versions", "settings", "ceilings", "op", "ceiling", "rows",
    }  # fmt: skip
    assert result["schema"] == runner.SCHEMA and result["hardware"]["slug"] == path.parent.name
    assert result["ceilings"]["copy_GBps"]["copy"] > 0 and result["ceilings"]["matmul_TFLOPs"]["fp32"] > 0
    timed = [row for row in result["rows"] if row["status"] == "ok"]
    assert {row["mode"] for row in timed} == set(MODES) and any(row["ours"] for row in timed)
    for row in timed:
        assert row["ms"]["q1"] <= row["ms"]["median"] <= row["ms"]["q3"] and row["rounds"] >= 3
        assert 0 <= row["error"] < 1e-3 and row["GBps"] > 0 and row["fraction"] > 0
        assert (row["gradient_error"] is None) == (row["mode"] == "forward")
    assert path.with_suffix(".svg").exists() and path.with_suffix(".png").exists()


def test_a_partial_run_keeps_the_other_cases() -> None:
    def result(*rows: tuple[str, str, int], torch_version: str = "2", batch: int = 1) -> dict[str, Any]:
        head = {"schema": 1, "op": "rms_norm", "hardware": {}, "versions": {"torch": torch_version}, "settings": {}}
        ceilings = {"matmul_TFLOPs": {dtype: 1.0 for _, dtype, _ in rows}}
        entered = [{"sample": a, "shape": [batch, 64], "dtype": b, "run": c} for a, b, c in rows]
        return {**head, "ceilings": ceilings, "rows": entered}

    old = result(("one", "fp32", 1), ("gemma3_270m", "fp32", 1), ("gemma3_270m", "bf16", 1))
    new = result(("gemma3_270m", "fp32", 2))
    both = cli.merged(new, old)
    assert [(row["sample"], row["dtype"], row["run"]) for row in both["rows"]] == [
        ("one", "fp32", 1),
        ("gemma3_270m", "fp32", 2),
        ("gemma3_270m", "bf16", 1),
    ]
    assert both["ceilings"]["matmul_TFLOPs"] == {"fp32": 1.0, "bf16": 1.0}
    models = [{**result(("tiny token", dtype, 1)), "op": "gemma_decode"} for dtype in ("fp32", "bf16")]
    assert [row["dtype"] for row in cli.merged(*models)["rows"]] == ["fp32", "bf16"]
    batches = [{**result(("tiny", "fp32", n), batch=n), "op": "maskgit"} for n in (16, 1)]
    assert [row["shape"] for row in cli.merged(*batches)["rows"]] == [[1, 64], [16, 64]]
    other = result(("gemma3_270m", "fp32", 2), torch_version="3")
    assert cli.merged(other, old) == other


def test_the_table_round_trips(repository: Path) -> None:
    check, write = ["--check", "--root", str(repository)], ["--root", str(repository)]
    assert table.main(check) == 1
    assert table.main(write) == 0
    assert table.main(check) == 0
    text = (repository / "README.md").read_text()
    assert text.startswith("# a\n") and text.endswith(f"{table.END}\n\nb\n") and "old" not in text
    assert "| `rms_norm` | 65 x 129 | fp32 |" in text
    assert "liger is absent: liger_kernel is not installed" in (repository / "docs/numbers.md").read_text()
    (repository / "README.md").write_text(text.replace("| fp32 |", "| fp64 |"))
    assert table.main(check) == 1


def test_models_race_with_equal_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoders and a step: every contestant that is there is right, and the table has a row for each event."""
    size = ["--preset", "siglip-tiny", "--batch", "1", "--step-batch", "2", "--repeats", "1", "--dtypes", "fp32"]
    monkeypatch.setattr(machine, "ceilings", lambda *args, **kwargs: CEILINGS)
    assert siglip.main([*size, "--out", str(tmp_path / "bench/results")]) == 0
    result = json.loads(next(tmp_path.glob("bench/results/*/siglip.json")).read_text())
    status = {(row["sample"], row["contestant"]): row["status"] for row in result["rows"]}
    assert len(status) == 7 and "failed" not in status.values()
    assert {row["status"] for row in result["rows"] if row["ours"]} == {"ok"}
    text = table.summary([result])
    for event in ("image, 1 x 3 x 32 x 32 (forward)", "text, 1 x 16 (forward)", "step, 2 x 3 x 32 x 32"):
        assert f"| `siglip` | siglip-tiny {event} | fp32 |" in text


def test_ragged_pictures_race_with_equal_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = ["--preset", "naflex-tiny", "--repeats", "1", "--dtypes", "fp32"]
    monkeypatch.setattr(machine, "ceilings", lambda *args, **kwargs: CEILINGS)
    assert naflex.main([*size, "--out", str(tmp_path / "bench/results")]) == 0
    result = json.loads(next(tmp_path.glob("bench/results/*/naflex.json")).read_text())
    status = {row["contestant"]: row["status"] for row in result["rows"]}
    assert len(status) == 3 and set(status.values()) == {"ok"}
    assert "| `naflex` | naflex-tiny image, 1324 x 192 (forward) | fp32 |" in table.summary([result])


def test_decoding_races_with_equal_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contexts below and above the window of 32, full and rings that have wrapped; and a prompt."""
    monkeypatch.setattr(machine, "ceilings", lambda *args, **kwargs: {**CEILINGS})
    monkeypatch.setattr(machine, "read_rate", lambda *args: 1.0)
    size = ["--preset", "gemma3-tiny", "--contexts", "9", "70", "--prompts", "40", "--repeats", "1", "--dtypes", "fp32"]
    assert gemma.main([*size, "--out", str(tmp_path / "bench/results")]) == 0
    decode, prefill = (
        json.loads(next(tmp_path.glob(f"bench/results/*/gemma_{part}.json")).read_text())
        for part in ("decode", "prefill")
    )
    assert [row["status"] for row in decode["rows"] + prefill["rows"]] == ["ok"] * 6
    assert all(row["error"] < 1e-5 for row in decode["rows"] + prefill["rows"])
    assert all(row["GBps"] > 0 for row in decode["rows"]) and "% read" in table.summary([decode])
    assert "| `gemma_prefill` | gemma3-tiny prompt, 1 x 40 (forward) | fp32 |" in table.summary([prefill])


def test_the_table_needs_its_markers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bench:start"):
        table.replaced("no markers", "")
    with pytest.raises(ValueError, match="no results"):
        table.load(tmp_path)


def test_a_slow_contestant_is_reported_and_not_raced(clock: timing.Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(x: torch.Tensor, weight: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        time.sleep(0.2)
        return rivals.rms_norm_formula(x, weight, **kwargs)

    monkeypatch.setattr(runner, "PATIENCE", 0.1)
    quick = Contestant("quick", partial(made, rivals.rms_norm_formula))
    rows = rows_of([Contestant("slow", partial(made, slow)), quick], clock)
    assert {(row["contestant"], row["status"]) for row in rows} == {("slow", "slow"), ("quick", "ok")}
    assert all("one call takes 0 s" in row["reason"] for row in rows if row["contestant"] == "slow")
    assert all(row["best_rival"] == "quick" for row in rows if row["contestant"] == "quick")

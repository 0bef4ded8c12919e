"""The command line as a user meets it: errors are one line on stderr and exit status 2, without a traceback.

Most of it is tested inside this process, where `main` must end with SystemExit(2): a start takes seconds.
"""

import json
import subprocess
import sys

import pytest
import shards

import vlkern
from vlkern._op import BACKENDS, REGISTRY
from vlkern.cli import COMMANDS, main
from vlkern.data import clipart_mini


def call(capfd, *arguments):
    """As a process of its own would end."""
    try:
        code = main([str(a) for a in arguments])
    except SystemExit as end:
        code = end.code
    return subprocess.CompletedProcess(arguments, code, *capfd.readouterr())


def assert_one_line(done, *parts):
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert done.stderr.startswith("vlkern: error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    for part in parts:
        assert part in done.stderr


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["dmeo"], "unknown command 'dmeo' (did you mean 'demo'?)"),
        (["frobnicate"], f"unknown command 'frobnicate' (the commands are {', '.join(COMMANDS)})"),
        (["--frobnicate"], "--frobnicate"),
        (["info", "--jsn"], "--jsn"),
        (["info", "extra"], "extra"),
        (["demo", "--steps", "many"], "argument --steps: expected a whole number, got 'many'"),
        (["demo", "--steps", "0"], "argument --steps: must be at least 1, got 0"),
        (["demo", "--minutes", "nan"], "argument --minutes: must be at least 0.01, got nan"),
        (["demo", "--minutes", "-1"], "argument --minutes: must be at least 0.01, got -1"),
        (["demo", "--minutes", "inf"], "argument --minutes: must be at most"),
        (["demo", "--seed", "1e99"], "argument --seed: expected a whole number, got '1e99'"),
        (["demo", "--seed", str(10**30)], "argument --seed: must be at most"),
        (["demo", "--queries"], "argument --queries"),
        (["demo", "--data", "/nowhere"], "/nowhere/train.tar: no such shard"),
        (["bench", "--repeats", "many"], "--repeats"),
    ],
)
def test_bad_arguments(arguments, part, capfd):
    assert_one_line(call(capfd, *arguments), part)


def test_the_process_ends_with_status_2(tmp_path):
    done = subprocess.run([sys.executable, "-m", "vlkern", "dmeo"], capture_output=True, text=True, cwd=tmp_path)
    assert_one_line(done, "unknown command 'dmeo' (did you mean 'demo'?)")


def test_unwritable_output(tmp_path, capfd):
    (tmp_path / "file").touch()
    done = call(capfd, "demo", "--out", tmp_path / "file" / "deeper")
    assert_one_line(done, "--out", "cannot write report.html there")


def test_corrupt_shard(tmp_path, capfd):
    whole = (clipart_mini() / "test.tar").read_bytes()
    (tmp_path / "train.tar").write_bytes(whole[: len(whole) // 2])
    done = call(capfd, "demo", "--data", tmp_path, "--out", tmp_path / "demo")
    assert_one_line(done, f"{tmp_path / 'train.tar'}: ")
    assert not (tmp_path / "demo" / "report.html").exists()


def test_too_many_bad_samples(tmp_path, capfd):
    shards.write(tmp_path / "train.tar", {f"{i}.json": b"{}" for i in range(20)})
    done = call(capfd, "demo", "--data", tmp_path, "--out", tmp_path / "demo")
    assert_one_line(done, "more than 10 bad samples", "train.tar")


def test_help_and_version(capsys):
    def printed(*arguments):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 0
        out, err = capsys.readouterr()
        assert err == ""
        return out

    assert printed("--version").startswith(f"vlkern {vlkern.__version__} (torch ")
    for command in COMMANDS:
        assert f"\n  {command}" in printed("--help")
        assert printed(command, "--help").startswith(f"usage: vlkern {command}")
    assert main([]) == 0
    assert capsys.readouterr().out == printed("--help")


def test_info(capfd):
    done = call(capfd, "info")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(call(capfd, "info", "--json").stdout)
    assert found["versions"]["vlkern"] == vlkern.__version__
    assert set(found["built"]) == {"_C", "_C_cuda", "_host"}
    assert found["cpu"]["cores"] >= 1 and found["cpu"]["memory_GiB"] > 0
    assert set(found["ops"]) == {op.public for op in REGISTRY.values()}
    for op in REGISTRY.values():
        states = found["ops"][op.public]
        assert list(states) == list(BACKENDS)
        assert states["reference"] == "yes"
        assert op.public in done.stdout
        for backend, state in states.items():
            assert f"  {backend:<11}{state}" in done.stdout
            if op.missing[backend]:
                assert state == f"no: {op.missing[backend]}"


def test_a_reader_that_leaves_early():
    command = f"{sys.executable} -m vlkern info | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("versions\n", "")


@pytest.mark.parametrize("buffered", [True, False])
def test_help_that_cannot_be_written(buffered, monkeypatch, capfd):
    with open("/dev/full", "w") as full:
        full.reconfigure(write_through=not buffered)
        monkeypatch.setattr("sys.stdout", full)
        done = call(capfd, "--help")
        monkeypatch.undo()
    assert_one_line(done, "standard output: cannot be written (No space left on device)")


def test_interrupted_while_pytorch_loads(tmp_path):
    """By a package of that name: the console command ends as it does later, with one line."""
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import vlkern_command; sys.exit(vlkern_command.main())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "vlkern: interrupted\n")


def test_commands_are_imported_when_used():
    """And a package that is missing then is named."""
    code = """
import contextlib, io, sys
from vlkern.cli import main
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    main(["--help"])
assert not {"PIL", "webdataset", "rich", "vlkern.demo", "vlkern.bench"} & set(sys.modules)
sys.modules["webdataset"] = None
main(["demo"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert_one_line(done, "`vlkern demo` needs webdataset: pip install 'vlkern[demo]'")

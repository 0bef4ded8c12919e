"""Runs that are killed with SIGKILL, again and again, end with the same bits as a run that is not."""

import random
import time

import pytest
import runs
import torch

STEPS = 8


def arguments(data, folder):
    return [
        "train", "siglip", "--preset", "test", "--data", data, "--out", folder, "--steps", STEPS, "--batch", 8,
        "--save-every", 1, "--log-every", 1, "--keep", 2, "--precision", "fp32", "--augment", "--lr", 0.01,
        "--device", "cpu",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.shard(tmp_path_factory.mktemp("data") / "train.tar", 24)


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    """world -> folder of a run that nobody disturbs."""
    folders = {}
    for world in (1, 2):
        folders[world] = tmp_path_factory.mktemp(f"unbroken{world}") / "run"
        runs.run(arguments(data, folders[world]), folders[world].with_name("said"), world=world)
    return folders


class Later:
    """True from `delay` seconds after the run in `folder` has completed `count` more checkpoints."""

    def __init__(self, folder, count, delay):
        self.folder, self.count, self.delay, self.since = folder / "checkpoints", count, delay, None
        self.before = self.newest()

    def newest(self):
        return max((int(path.name[5:]) for path in self.folder.glob("step-*") if path.suffix != ".tmp"), default=0)

    def __call__(self):
        if self.since is None and self.newest() >= self.before + self.count:
            self.since = time.monotonic()
        return self.since is not None and time.monotonic() > self.since + self.delay


def again(data, folder):
    """What a user types next."""
    return arguments(data, folder) + ["--resume"] * (folder / "config.json").exists()


def assert_same(folder, whole):
    ours, theirs = runs.weights(folder), runs.weights(whole)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    ours, theirs = runs.records(folder), runs.records(whole)
    assert [r["step"] for r in ours] == list(range(1, STEPS + 1))
    for name in ("loss", "lr", "grad_norm", "scale", "bias"):
        assert [r[name] for r in ours] == [r[name] for r in theirs], name
    left = {path.name for path in (folder / "checkpoints").iterdir()}
    assert left == {f"step-{STEPS}", f"step-{STEPS - 1}"}


def test_killed_at_every_file_operation(data, unbroken, tmp_path):
    """Attempt n dies at its n-th fsync, rename or rmdir: between any two of them, and while files are being written."""
    folder, said, event, unfinished = tmp_path / "run", tmp_path / "said", 0, 0
    while True:
        event += 1
        (code,) = runs.wait(runs.start(again(data, folder), said, event=event))
        if code == 0:
            break
        assert code == -9, said.with_name("said.0").read_text()
        unfinished += bool(list(folder.glob("checkpoints/*.tmp")))
        assert event < 200
    assert event > 12 and unfinished > 3
    assert_same(folder, unbroken[1])


def test_killed_at_random_times_on_two_ranks(data, unbroken, tmp_path):
    folder, said, draw, attempts = tmp_path / "run", tmp_path / "said", random.Random(0), 0
    while True:
        attempts += 1
        codes = runs.wait(
            runs.start(again(data, folder), said, world=2),
            kill_when=Later(folder, draw.randint(1, 2), draw.uniform(0, 0.2)),
        )
        if codes == [0, 0]:
            break
        assert attempts < 40 and all(code in (0, -9) for code in codes), said.with_name("said.0").read_text()
    assert attempts > 3
    assert_same(folder, unbroken[2])


def assert_close(folder, whole):
    ours, theirs = runs.weights(folder), runs.weights(whole)
    for name in ours:
        # Adding a constant to all keys changes nothing: the gradient is rounding, and Adam makes steps of it.
        if not name.endswith(("k_proj.bias", "in_proj_bias")):
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4, msg=name)
    for a, b in zip(runs.records(folder), runs.records(whole), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_two_ranks_learn_what_one_learns(unbroken):
    assert_close(unbroken[2], unbroken[1])


def test_from_two_ranks_with_fsdp_to_one(data, unbroken, tmp_path):
    """Half of the run is cut over two ranks, gradients and optimizer too; then it is killed, and one rank goes on."""
    folder, said = tmp_path / "run", tmp_path / "said"
    parts = runs.start([*arguments(data, folder), "--parallel", "fsdp"], said, world=2)
    runs.wait(parts, kill_when=Later(folder, STEPS // 2, 0))
    assert "after step " in runs.run(again(data, folder), said)
    assert_close(folder, unbroken[1])

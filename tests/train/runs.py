"""Training runs for the tests, every rank a process of its own."""

import io
import json
import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import forks
import pytest
import safetensors.torch
import shards
import torch
from PIL import Image

from vlkern.models import fsq_autoencoder, givt, jet, jetformer, m2t, maskgit, navit, paligemma, vae
from vlkern.models.conv_autoencoder import ConvConfig
from vlkern.models.gemma import GemmaConfig
from vlkern.models.jet import JetConfig
from vlkern.models.siglip import SiglipConfig, TextConfig, VisionConfig

#: The preset "test".
CONFIG = SiglipConfig(VisionConfig(24, 2, 2, 48, (16, 16), 8), TextConfig(16, 1, 2, 32, 300, 8))
#: The preset "navit-test".
NAVIT = navit.NavitConfig(
    navit.VisionConfig(width=24, depth=2, heads=3, mlp=48, patch=4, grid=8),
    navit.TextConfig(width=16, depth=1, heads=2, mlp=32, vocabulary=300, length=8),
)
#: The preset "paligemma-test", 4 tokens an image, with a window smaller than a row.
PALIGEMMA = paligemma.PaliGemmaConfig(
    VisionConfig(24, 2, 3, 48, (16, 16), 8),
    GemmaConfig(
        width=32, depth=2, heads=2, kv_heads=1, head_dim=16, mlp=48, query_scalar=16, version=2, vocabulary=64,
        context=128, pattern="LG", window=8, final_softcap=30.0, whole_prefix=True,
    ),
    60, 60,
)  # fmt: skip
#: The preset "jetformer-test", 4 tokens a picture.
JETFORMER = jetformer.JetFormerConfig(
    JetConfig(2, 1, 48, depth=2, block_depth=1, width=16, heads=2, kinds=("channels",)),
    4, 8, 3, width=24, depth=2, heads=3, head_dim=8, mlp=32, vocabulary=270, text_length=5,
)  # fmt: skip
#: The presets "fsq-test" and "vae-test".
CONVOLUTIONS = ConvConfig(8, (1, 2), blocks=1, groups=4)
FSQ = fsq_autoencoder.FsqConfig((4, 3), 8, 8, CONVOLUTIONS)
VAE = vae.VaeConfig(2, 8, (1, 2), network=CONVOLUTIONS)
#: The presets "givt-test" and "givt-masked-test"; the autoencoder and the classes say the rest.
GIVT = givt.GivtConfig(16, 1, 2, 24, length=1, channels=1, components=2)
#: The preset "maskgit-test"; the autoencoder and the classes say the rest.
MASKGIT = maskgit.MaskGitConfig(16, 2, 2, 24, tokens=1, codes=1, classes=1, image_size=1)
#: The preset "jet-test".
JET = jet.JetConfig(8, 2, depth=5, block_depth=1, width=16, heads=2, basis="cosines")
#: The preset "mt-test".
MT = replace(m2t.PRESETS["m2t-tiny"], bidirectional=True)
#: Where a rank can be made to kill itself: calls that make files durable or visible.
_EVENTS = ("fsync", "rename", "replace", "rmdir")


def _die_at(event: int) -> None:
    """SIGKILL for this process instead of call number `event` of those that matter to a checkpoint."""
    count = 0

    def counted(call: Any) -> Any:
        def instead(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == event:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return instead

    for name in _EVENTS:
        setattr(os, name, counted(getattr(os, name)))


def _rank(rank: int, world: int, port: int, arguments: list[str], output: str, event: int, largest: int | None) -> None:
    from vlkern.cli import main
    from vlkern.models.siglip import PRESETS

    PRESETS["test"] = CONFIG
    navit.PRESETS["navit-test"] = NAVIT
    givt.PRESETS["givt-test"] = GIVT
    givt.PRESETS["givt-masked-test"] = replace(GIVT, style="masked")
    jet.PRESETS["jet-test"] = JET
    m2t.PRESETS["mt-test"] = MT
    maskgit.PRESETS["maskgit-test"] = MASKGIT
    paligemma.PRESETS["paligemma-test"] = PALIGEMMA
    jetformer.PRESETS["jetformer-test"] = JETFORMER
    fsq_autoencoder.PRESETS["fsq-test"] = FSQ
    vae.PRESETS["vae-test"] = VAE
    forks.become(rank, world, port, output)
    torch.set_num_threads(1)
    if event:
        _die_at(event)
    if largest is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    raise SystemExit(main(arguments))


def start(
    arguments: list[Any], output: Path, *, world: int = 1, event: int = 0, largest: int | None = None
) -> list[Any]:
    """`vlkern ARGUMENTS` on `world` ranks, which print to `output`.0, `output`.1, ...

    Rank 0 dies at its event number `event`, if that is not 0. No file can grow beyond `largest` bytes.
    """
    context, port = forks.context(), forks.free_port()
    words = [str(a) for a in arguments]
    ranks = [
        context.Process(
            target=_rank, args=(r, world, port, words, str(output), 0 if r else event, largest), daemon=True
        )
        for r in range(world)
    ]
    for process in ranks:
        process.start()
    return ranks


def wait(ranks: list[Any], *, seconds: float = 60, kill_when: Callable[[], bool] = lambda: False) -> list[int]:
    """Exit codes. SIGKILL ends all ranks 5 s after one of them has ended badly, or when the caller says so."""
    begin, bad = time.monotonic(), None
    while any(p.is_alive() for p in ranks):
        spent = time.monotonic() - begin
        if bad is None and any(p.exitcode for p in ranks):
            bad = spent
        if kill_when() or (bad is not None and spent > bad + 5):
            for p in ranks:
                p.kill()
        if spent > seconds:
            for p in ranks:
                p.kill()
            raise TimeoutError(f"still running after {seconds} s")
        time.sleep(0.002)
    return [p.exitcode for p in ranks]


def run(arguments: list[Any], output: Path, *, world: int = 1) -> str:
    """A run that must succeed; what rank 0 said."""
    codes = wait(start(arguments, output, world=world))
    said = [Path(f"{output}.{r}").read_text() for r in range(world)]
    assert codes == [0] * world, "\n".join(said)
    return said[0]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model" / "model.safetensors")


def same_weights(ours: Path, theirs: Path, atol: float) -> None:
    """The models of two runs are the same but for rounding."""
    one, other = weights(ours), weights(theirs)
    assert one.keys() == other.keys()
    for name, tensor in other.items():
        assert torch.allclose(one[name], tensor, atol=atol), name


def refusal(arguments: list[Any], caught: Any) -> str:
    """What the command says in this process before it ends with status 2. `caught`: pytest's capsys or capfd."""
    from vlkern.cli import main

    with pytest.raises(SystemExit, match="2"):
        main([str(a) for a in arguments])
    said = caught.readouterr().err
    assert "vlkern: error: " in said and "Traceback" not in said
    return said


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def shard(path: Path, count: int) -> Path:
    """Pictures that differ, and say how."""
    members: dict[str, bytes] = {}
    for i in range(count):
        members[f"{i:04}.png"] = shards.picture(color=(10 * i, 255 - 10 * i, 40 * i % 256), size=(16, 16))
        members[f"{i:04}.json"] = json.dumps({"captions": [f"colour {i}", f"{i} of {count}"]}).encode()
    return shards.write(path, members)


def classes(path: Path, count: int) -> Path:
    """As shard, of plants, animals and food."""
    members: dict[str, bytes] = {}
    for i in range(count):
        members[f"{i:04}.png"] = shards.picture(color=(10 * i, 255 - 10 * i, 40 * i % 256), size=(16, 16))
        told = {"captions": [f"number {i}"], "category": f"{['plants', 'animals', 'food'][i % 3]}/{i}"}
        members[f"{i:04}.json"] = json.dumps(told).encode()
    return shards.write(path, members)


def drawings(path: Path, count: int) -> Path:
    """Pictures of many shapes that say their colour."""
    members: dict[str, bytes] = {}
    for i in range(count):
        out = io.BytesIO()
        Image.new("RGB", (10 + 3 * i, 60 - 2 * i), (10 * i, 255 - 10 * i, 40 * i % 256)).save(out, "PNG")
        members[f"{i:04}.png"] = out.getvalue()
        members[f"{i:04}.json"] = json.dumps({"captions": [f"colour {i}", f"{i} of {count}"]}).encode()
    return shards.write(path, members)


def undisturbed(arguments: Callable[[Path], list[Any]], new_folder: Callable[[str], Path]) -> dict[int, Path]:
    """Number of ranks, 1 and 2 -> folder of a run by `arguments(folder)` that nobody kills."""
    folders = {world: new_folder(f"unbroken{world}") / "run" for world in (1, 2)}
    for world, folder in folders.items():
        run(arguments(folder), folder.with_name("said"), world=world)
    return folders

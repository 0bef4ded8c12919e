"""Compiles every Triton kernel for every supported chip without a GPU and tabulates what it costs there.

    python tests/triton/aot.py                    the table on standard output
    python tests/triton/aot.py --update           the table to bench/results/aot/triton-<version>.json
    python tests/triton/aot.py --ptx FOLDER       keep the PTX as well
    python tests/triton/aot.py --part             only what the tests compile: the first benchmarked shape in bfloat16,
                                                  for sm_90 also a ragged one in float32

The launchers themselves run: on meta tensors of the benchmarked shapes, with a driver that names the chip and launches
nothing. So the kernels are compiled with exactly the configurations, constants and alignments of a call on that chip.
"""

import argparse
import io
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"
os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp(prefix="vlkern-aot-"))

import torch
import triton
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

import vlkern
from vlkern import _triton
from vlkern._op import REGISTRY, Op
from vlkern.testing import Call, is_float, record

#: Another Triton allocates other registers, so every minor version has a table of its own.
VERSION = ".".join(triton.__version__.split(".")[:2])
TABLE = Path(__file__).parents[2] / "bench" / "results" / "aot" / f"triton-{VERSION}.json"
CHIPS = {"sm_80": _triton.A100, "sm_90": _triton.H200, "sm_100": _triton.B200}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
#: Rooms whose kernels take minutes to compile for every shape: in float32 the table has one, the tests have none.
SLOW = ("interval_attention",)
TENSOR_CORES = ("wgmma.mma_async", "tcgen05.mma", "mma.sync")
LOG = re.compile(
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers", re.DOTALL
)


class Driver:
    """In the place of the GPU's driver. `kernels` is what would have been loaded since it was last emptied."""

    def __init__(self, chip: _triton.Chip) -> None:
        self.chip = chip
        self.kernels: list[Any] = []
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": chip.shared},
            load_binary=lambda *kernel: (1, 1, 0, 0, 1024),
        )

    def get_current_device(self) -> int:
        return self.chip.arch  # kernels compiled for one chip must not serve another

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.chip.arch, 32)

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        self.kernels.append(metadata)
        return lambda *launch: None


def raw_calls(op: Op, sample: Any, dtype: torch.dtype) -> list[Call]:
    """The raw calls, on meta tensors, that the public op makes for a sample with and without gradients."""
    args, kwargs = import_module(f"vlkern.kernels.{op.name}.samples").inputs(sample, dtype, "meta")
    public = getattr(vlkern.ops, op.public)
    with vlkern.backend(f"{op.name}=reference"), record() as calls, torch.enable_grad():
        public(*args, **kwargs)
        if op.differentiable:
            wanted = [a.requires_grad_() for a in args if is_float(a)]
            out = [t for t in tree_leaves(public(*args, **kwargs)) if t.requires_grad]
            torch.autograd.grad(out, wanted, [torch.empty_like(t) for t in out])
    return calls


def compiled(op: Op, sample: Any, dtype: torch.dtype, on: Driver) -> Iterator[tuple[Any, str, str]]:
    """Runs the launchers; yields metadata, PTX and the assembler's log of every kernel that had to be compiled."""
    room = import_module(f"vlkern.kernels.{op.name}.triton")
    found: list[tuple[str, str]] = []
    with redirect_stdout(io.StringIO()) as log:

        def listen(*, metadata_group: dict[str, str], **_: Any) -> None:
            ptx = next(Path(path) for name, path in metadata_group.items() if name.endswith(".ptx"))
            found.append((ptx.read_text(), log.getvalue()))
            log.seek(0)
            log.truncate()

        triton.knobs.compilation.listener = listen
        on.kernels.clear()
        with torch.no_grad():
            for call in raw_calls(op, sample, dtype):
                getattr(room, call.op._schema.name.split("::")[1])(*call.args)
    assert len(found) == len(on.kernels)
    return ((metadata, *texts) for metadata, texts in zip(on.kernels, found, strict=True))


def shapes(op: Op, dtype: torch.dtype, chip: str, part: bool) -> list[Any]:
    """The benchmarked shapes, and the largest of the others: a ragged one, whose kernels have masks.

    A kernel that two shapes share is counted with the first.
    """
    samples = import_module(f"vlkern.kernels.{op.name}.samples").SAMPLES
    first, *more = (s for s in samples if s.bench)
    ragged = [s for s in samples if not s.bench][-1]
    if part and dtype == torch.float32:
        return [ragged] if chip == "sm_90" and op.name not in SLOW else []
    if part or (op.name in SLOW and dtype == torch.float32):
        return [first]
    return [first, ragged, *more]


def table(keep: Path | None = None, part: bool = False) -> list[dict[str, Any]]:
    """One row per compiled kernel: where it comes from, and registers, spills, stack, shared memory, tensor cores."""
    triton.knobs.compilation.always_compile = True
    triton.knobs.nvidia.dump_ptxas_log = True
    rows = []
    for chip_name, chip in CHIPS.items():
        on = Driver(chip)
        driver.set_active(on)  # type: ignore[arg-type]
        _triton.STAND_IN[0] = chip
        for op in (op for op in REGISTRY.values() if "triton" in op.backends):
            for dtype_name, dtype in DTYPES.items():
                for sample in shapes(op, dtype, chip_name, part):
                    for metadata, ptx, log in compiled(op, sample, dtype, on):
                        stack, stores, loads, registers = map(int, LOG.search(log).groups())  # type: ignore[union-attr]
                        name = f"{op.name}{metadata.name} {dtype_name} {sample.name}"
                        name += f" {sum(r['kernel'].startswith(name) and r['chip'] == chip_name for r in rows)}"
                        rows.append(
                            {
                                "chip": chip_name,
                                "kernel": name,
                                "registers": registers,
                                "spill_stores": stores,
                                "spill_loads": loads,
                                "stack": stack,
                                "shared": metadata.shared,
                                "warps": metadata.num_warps,
                                "tensor_cores": next((i for i in TENSOR_CORES if i in ptx), None),
                            }
                        )
                        if keep:
                            (keep / f"{chip_name} {name}.ptx".replace(" ", "-")).write_text(ptx)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help=f"write {TABLE.name} instead of printing it")
    parser.add_argument("--ptx", type=Path, metavar="FOLDER", help="keep the PTX of every kernel here")
    parser.add_argument("--part", action="store_true", help="only what the tests compile")
    options = parser.parse_args()
    if options.ptx:
        options.ptx.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join(json.dumps(row) for row in table(options.ptx, options.part))
    text = f'{{"triton": "{triton.__version__}", "kernels": [\n{rows}\n]}}\n'
    if options.update:
        TABLE.parent.mkdir(parents=True, exist_ok=True)
        TABLE.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()

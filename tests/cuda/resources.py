"""Compiles every CUDA kernel for every supported chip without a GPU and tabulates what each one costs.

python tests/cuda/resources.py            print the table
python tests/cuda/resources.py --update   write it to bench/results/aot/cuda.json
"""

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import triton

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "bench" / "results" / "aot" / "cuda.json"
ARCHS = ("80", "90a", "100a")
# As in CMakeLists.txt, without the host's half of the work.
FLAGS = [
    *["-fatbin", "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Werror", "all-warnings", "-Xptxas", "-v"],
    *["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"],
    *["-I", str(ROOT / "csrc"), "-isystem", str(Path(torch.__file__).parent / "include")],
]
REPORT = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
USAGE = re.compile(
    r"arch = (?P<arch>\w+)|"
    r"Function (?P<symbol>\w+):\s+REG:(?P<registers>\d+) STACK:(?P<stack>\d+) SHARED:(?P<shared>\d+)"
)


@dataclass(frozen=True, order=True)
class Row:
    """What one kernel takes on one chip; spills are bytes stored and loaded, `registers` is per thread."""

    kernel: str
    arch: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int


def readable(symbols: list[str]) -> list[str]:
    """`forward_cached<BFloat16, 4>` from a mangled name, without namespaces and arguments."""
    out = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    hidden = "(anonymous namespace)::"
    names = [line.split(hidden, 1)[-1].replace(hidden, "").split("(", 1)[0] for line in out.splitlines()]
    return [re.sub(r"[\w:]*::|^void ", "", name) for name in names]


def sources() -> dict[str, Path]:
    """The files of kernels: those of the rooms by room, others by their own name."""
    rooms, others = ROOT.glob("kernels/*/cuda.cu"), ROOT.glob("csrc/cuda/*.cu")
    return {path.parent.name: path for path in rooms} | {path.stem: path for path in others}


def compile_file(name: str, source: Path, archs: tuple[str, ...]) -> list[Row]:
    """Compiles one file; raises RuntimeError with the compiler's words when that fails."""
    chips = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    with TemporaryDirectory() as folder:
        command = ["nvcc", *FLAGS, *chips, "-o", f"{folder}/kernels.fatbin", str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc failed on {source.relative_to(ROOT)}:\n{done.stdout}{done.stderr}")
    found = list(REPORT.finditer(done.stdout + done.stderr))
    rows = []
    for match, kernel in zip(found, readable([m["symbol"] for m in found]), strict=True):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        rows.append(
            Row(
                kernel=f"{name}/{kernel}",
                arch=match["arch"],
                registers=int(match["registers"]),
                spill_bytes=int(match["stores"]) + int(match["loads"]),
                stack_bytes=int(match["stack"]),
                shared_bytes=int(shared[1]) if shared else 0,
            )
        )
    return rows


def built() -> list[Row]:
    """What the last build of this checkout made of every file. Spills, whose number is not kept, lie on the stack."""
    objects = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}" / "CMakeFiles/_C_cuda.dir"
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    rows = []
    for name, source in sources().items():
        if not (path := objects / f"{source.relative_to(ROOT)}.o").exists():
            continue
        said = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
        found = list(USAGE.finditer(said))
        arch = ""
        for match, kernel in zip(found, readable([m["symbol"] or "" for m in found]), strict=True):
            if match["arch"]:
                arch = match["arch"]
            else:
                registers, stack, shared = map(int, match.group("registers", "stack", "shared"))
                rows.append(Row(f"{name}/{kernel}", arch, registers, 0, stack, shared))
    return rows


def compile_all(archs: tuple[str, ...] = ARCHS) -> list[Row]:
    """Every kernel of every file on these chips, sorted."""
    with ThreadPoolExecutor() as pool:
        files = list(pool.map(lambda item: compile_file(*item, archs), sorted(sources().items())))
    return sorted(row for rows in files for row in rows)


def committed() -> list[Row]:
    """The table in the repository."""
    return [Row(**row) for row in json.loads(TABLE.read_text())]


if __name__ == "__main__":
    rows = compile_all()
    for row in rows:
        print(f"{row.kernel:48}{row.arch:8}", *(f"{value:6}" for value in list(asdict(row).values())[2:]))
    if "--update" in sys.argv[1:]:
        TABLE.parent.mkdir(parents=True, exist_ok=True)
        TABLE.write_text("[\n" + ",\n".join(f"  {json.dumps(asdict(row))}" for row in rows) + "\n]\n")

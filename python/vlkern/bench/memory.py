"""Peak extra memory of a contestant: peak - inputs - outputs - gradients of the inputs.

On the CPU it is the high-water mark of a fresh process (forked from a server that has only imported the library); on
CUDA it is the allocator's.
"""

import ctypes
import gc
import multiprocessing
from multiprocessing.connection import Connection

import torch

from vlkern.bench.case import Case, Inputs, modes_of, samples_of
from vlkern.bench.rivals import Contestant, Function

_M_MMAP_THRESHOLD = -3
_SECONDS = 300


def _status(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith(field))


def _bytes(results: list[torch.Tensor]) -> int:
    """Each memory once: two inputs may share one gradient."""
    return sum({t.data_ptr(): t.nbytes for t in results}.values())


def _peak_on_cpu(inputs: Inputs, function: Function, mode: str, libc: ctypes.CDLL) -> int:
    gc.collect()
    libc.malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as marks:
        marks.write("5")  # the high-water mark starts again from here
    before = _status("VmRSS")
    results = inputs.run(function, mode)
    return _status("VmHWM") - before - _bytes(results)


def _warm_up(case: Case, contestant: Contestant, inputs: Inputs, function: Function) -> None:
    """Threads, libraries and tables are not the op's memory: a small sample brings them in.

    A compiled contestant has to run at full size, because compiling takes memory, too.
    """
    if not contestant.compiled:
        small = [s for s in samples_of(case.op).SAMPLES if not s.bench][-1]
        inputs = Case(case.op, small, case.dtype, case.device).inputs()
    for mode in modes_of(case.op):
        inputs.run(function, mode)


def _child(connection: Connection, case: Case, contestant: Contestant, modes: tuple[str, ...]) -> None:
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(
            _M_MMAP_THRESHOLD, 1 << 16
        )  # blocks of 64 KiB and more leave the process as soon as they are freed
        inputs, function = case.inputs(), contestant.make()
        _warm_up(case, contestant, inputs, function)
        connection.send({mode: _peak_on_cpu(inputs, function, mode, libc) for mode in modes})
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")


def _on_cpu(case: Case, contestant: Contestant, modes: tuple[str, ...]) -> dict[str, int]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    here, there = context.Pipe()
    process = context.Process(target=_child, args=(there, case, contestant, modes))
    process.start()
    there.close()
    try:
        answer = here.recv() if here.poll(_SECONDS) else f"no answer within {_SECONDS} s"
    except EOFError:
        process.join()
        answer = f"the process ended with code {process.exitcode}"
    if process.is_alive():
        process.terminate()
    process.join()
    if isinstance(answer, str):
        raise RuntimeError(f"memory of {contestant.name}: {answer}")
    peaks: dict[str, int] = answer
    return peaks


def _on_cuda(case: Case, contestant: Contestant, modes: tuple[str, ...]) -> dict[str, int]:
    inputs, function = case.inputs(), contestant.make()
    _warm_up(case, contestant, inputs, function)
    peaks = {}
    for mode in modes:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = inputs.run(function, mode)
        torch.cuda.synchronize()
        peaks[mode] = torch.cuda.max_memory_allocated() - before - _bytes(results)
    return peaks


def extra_memory(case: Case, contestant: Contestant, modes: tuple[str, ...]) -> dict[str, int]:
    """Mode -> bytes. Raises RuntimeError when the contestant does not survive its own process."""
    measure = _on_cpu if case.device == "cpu" else _on_cuda
    return {mode: max(0, peak) for mode, peak in measure(case, contestant, modes).items()}

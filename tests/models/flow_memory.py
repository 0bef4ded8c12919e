"""What a flow keeps for its backward; run as a program, the peak memory of training steps of several depths.

python tests/models/flow_memory.py
"""

import ctypes
import dataclasses
import multiprocessing

import torch

from vlkern.models.jet import Jet, JetConfig

#: 256 tokens of 48 numbers, as at 64 px with patches of 4.
MEASURED = JetConfig(64, 4, block_depth=1, width=64, heads=4)


def saved_bytes(config: JetConfig, depth: int) -> dict[str, int]:
    """ "plain" and "invertible" -> bytes that autograd saves of a batch, without parameters and buffers."""
    found = {}
    for name, invertible in (("plain", False), ("invertible", True)):
        model = Jet(dataclasses.replace(config, depth=depth, invertible=invertible))
        own = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
        kept = {}

        def pack(t, own=own, kept=kept):
            if t.untyped_storage().data_ptr() not in own:
                kept[t.untyped_storage().data_ptr()] = t
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            z, logdet = model(torch.zeros(4, config.tokens, config.token))
        del z, logdet
        found[name] = sum(t.untyped_storage().nbytes() for t in kept.values())
    return found


def _status(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith(field))


def _peak(config: JetConfig, batch: int, answer) -> None:
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 1 << 16)  # blocks of 64 KiB and more leave the process as soon as they are freed
    torch.set_num_threads(1)
    model = Jet(config)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    model.bits(torch.rand(1, config.tokens, config.token)).mean().backward()  # tables and libraries
    x = torch.rand(batch, config.tokens, config.token)
    libc.malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as marks:
        marks.write("5")  # the high-water mark starts again from here
    before = _status("VmRSS")
    model.bits(x).mean().backward()
    answer.send(_status("VmHWM") - before)


def peak(config: JetConfig, batch: int) -> int:
    """Bytes that one forward and backward needs beyond parameters and gradients: the peak of a fresh process."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_peak, args=(config, batch, there))
    process.start()
    found = here.recv()
    process.join()
    return found


if __name__ == "__main__":
    for depth in (8, 32):
        for invertible in (False, True):
            config = dataclasses.replace(MEASURED, depth=depth, invertible=invertible)
            print(f"depth {depth:2d}  invertible {invertible!s:5}  {peak(config, 16) / 2**20:.1f} MiB", flush=True)

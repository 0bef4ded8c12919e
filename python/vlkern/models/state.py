"""Tensors in files, and how they become the parameters of a model: all of them, or none and the list of what is wrong.

Only formats that hold numbers are read: safetensors and .npz without objects. A pickle (.pt, .bin, ...) is a program
that runs when it is loaded, so it is refused, whatever its name.
"""

import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from vlkern.errors import UserError
from vlkern.layers.init import shapes_only

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Checkpoint(Protocol):
    """Named tensors in files."""

    @property
    def path(self) -> Path:
        """What errors call it."""

    @property
    def shapes(self) -> Mapping[str, torch.Tensor]:
        """Every tensor without its data, on the meta device."""

    def read(self, name: str) -> torch.Tensor:
        """The tensor on the CPU."""


class SafetensorsFiles:
    """One safetensors file or several. What is read stays in the file until it is used, and is copied when written to.

    Raises:
        UserError: a file cannot be read, is cut short, or is not in this format; two files hold the same tensor.
    """

    def __init__(self, path: Path, files: Sequence[Path]) -> None:
        self.path = path
        self.shapes: dict[str, torch.Tensor] = {}
        self._file_of: dict[str, safe_open] = {}
        for file in files:
            try:
                opened = safe_open(str(file), framework="pt", device="cpu")
                names = list(opened.keys())
                for name in names:
                    piece = opened.get_slice(name)
                    if name in self.shapes:
                        raise UserError(f"{file}: tensor {name} is also in another file of this checkpoint")
                    dtype = _SAFETENSORS_DTYPES.get(piece.get_dtype(), torch.uint8)
                    self.shapes[name] = torch.empty(piece.get_shape(), dtype=dtype, device="meta")
            except (OSError, SafetensorError) as error:
                raise UserError(f"{file}: not a whole safetensors file ({_first_line(error)})") from error
            self._file_of |= dict.fromkeys(names, opened)

    def read(self, name: str) -> torch.Tensor:
        """A view of the mapped file."""
        return self._file_of[name].get_tensor(name)


# Anything else is no parameter, and shows up as uint8 in the list of what is wrong.
_SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool,
}  # fmt: skip


# What zipfile, zlib and NumPy raise for damaged files; RuntimeError is for sizes below zero.
_BAD_ARCHIVE = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


class NpzFile:
    """The arrays of an .npz file. bfloat16, which NumPy writes as two bytes without a type, is recognised.

    Raises:
        UserError: the file cannot be read, is cut short, or holds Python objects.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shapes: dict[str, torch.Tensor] = {}
        self._last: tuple[str, torch.Tensor] | None = None
        objects = []
        try:
            with zipfile.ZipFile(path) as archive:
                for member in archive.namelist():
                    name = member.removesuffix(".npy")
                    with archive.open(member) as stream:
                        shape, dtype = _npy_header(stream)
                    if dtype.hasobject:
                        objects.append(name)
                    else:
                        self.shapes[name] = torch.empty(shape, dtype=_torch_dtype(dtype), device="meta")
        except _BAD_ARCHIVE as error:
            raise UserError(f"{path}: not a whole .npz file ({_first_line(error)})") from error
        if objects:
            raise UserError(
                f"{path}: {', '.join(objects)} hold Python objects, stored as pickles; reading them could run code, so "
                "they are refused. Save plain arrays"
            )

    def read(self, name: str) -> torch.Tensor:
        """The array; the last one is kept, since a stack of layers is asked for once per layer."""
        if self._last is None or self._last[0] != name:
            try:
                with np.load(self.path, allow_pickle=False) as file:
                    array = file[name]
            except _BAD_ARCHIVE as error:
                raise UserError(f"{self.path}: cannot read {name} ({_first_line(error)})") from error
            self._last = name, as_tensor(array)
        return self._last[1]


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """The array's memory as a tensor; two bytes without a type are bfloat16.

    Raises:
        TypeError: PyTorch has no such type.
    """
    if _is_bfloat16(array.dtype):
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    return shape, dtype


def _is_bfloat16(dtype: np.dtype) -> bool:
    return dtype.kind == "V" and dtype.itemsize == 2


def _torch_dtype(dtype: np.dtype) -> torch.dtype:
    if _is_bfloat16(dtype):
        return torch.bfloat16
    try:
        return torch.from_numpy(np.empty(0, dtype)).dtype
    except TypeError:  # text and the like is no parameter, and shows up as uint8 in the list of what is wrong
        return torch.uint8


def open_checkpoint(path: Path) -> Checkpoint:
    """The tensors of one file, by what it is and not by its name.

    Raises:
        UserError: it cannot be read, is a pickle, or is neither safetensors nor .npz.
    """
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise UserError(f"{path}: cannot read ({error.strerror})") from error
    if start[:1] == b"\x80" or (start[:4] == b"PK\x03\x04" and _is_torch_zip(path)):
        refuse_pickle(path)
    if start[:4] == b"PK\x03\x04":
        return NpzFile(path)
    if start[8:9] == b"{":  # after eight bytes of length, a header in JSON
        return SafetensorsFiles(path, [path])
    what = "empty" if not start else f"it begins with {start!r}"
    raise UserError(f"{path}: expected a safetensors or .npz file, {what}")


def _is_torch_zip(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a whole zip file ({_first_line(error)})") from error


def refuse_pickle(path: Path) -> NoReturn:
    """Say why a pickle is not read.

    Raises:
        UserError: always.
    """
    raise UserError(
        f"{path}: a pickle file; loading one can run any code that is in it, so it is refused. Take the checkpoint in "
        "safetensors, or convert it: safetensors.torch.save_file(torch.load(FILE, weights_only=True), ...)"
    )


@dataclass(frozen=True)
class Source:
    """Where a parameter comes from: `make` of the tensors `names`, in this order."""

    names: tuple[str, ...]
    make: Callable[..., torch.Tensor]


def same(name: str) -> Source:
    """The tensor `name` as it is."""
    return Source((name,), lambda tensor: tensor)


def collect(
    checkpoint: Checkpoint,
    wanted: Mapping[str, torch.Tensor],
    sources: Mapping[str, Source],
    dtype: torch.dtype | None = None,
    root: str = "",
) -> dict[str, torch.Tensor]:
    """The state of a model, once everything is known to be there and to fit.

    Args:
        checkpoint: where the tensors are.
        wanted: name -> tensor of the right shape (on the meta device), the state of the model. Where one has no
            floating-point type (an index), the file's must be the same.
        sources: one for each name of `wanted`.
        root: tensors whose names do not begin with it (the state of an optimizer) are not the model's.
        dtype: of the result; None takes the file's, and where dtypes are mixed the narrowest that holds them all.

    Raises:
        UserError: tensors are missing, left over, of a wrong shape or of a type that is no float: all are listed.
    """
    wrong: list[str] = []
    shapes = checkpoint.shapes
    for name, target in wanted.items():
        source = sources[name]
        if gone := [part for part in source.names if part not in shapes]:
            origin = "" if gone == [name] else f" (from {', '.join(gone)})"
            wrong.append(f"missing {name} {list(target.shape)}{origin}")
            continue
        parts = [shapes[part] for part in source.names]
        try:
            got = list(source.make(*parts).shape)
        except (RuntimeError, IndexError, ValueError, TypeError):
            got = None  # too far from what is expected even to be rearranged
        if got != list(target.shape):
            origin = "" if source.names == (name,) else f" (from {', '.join(source.names)})"
            came = got if got is not None else ", ".join(str(list(part.shape)) for part in parts)
            wrong.append(f"wrong shape {name}: expected {list(target.shape)}, got {came}{origin}")
        for part, tensor in zip(source.names, parts, strict=True):
            if target.dtype in FLOATS and tensor.dtype not in FLOATS:
                wrong.append(f"wrong type {part}: expected floating point, got {tensor.dtype}")
            elif target.dtype not in FLOATS and tensor.dtype != target.dtype:
                wrong.append(f"wrong type {part}: expected {target.dtype}, got {tensor.dtype}")
    used = {part for source in sources.values() for part in source.names}
    # Old files of transformers hold the numbers 0, 1, 2, ... beside the position embeddings.
    left = [
        part for part in shapes if part.startswith(root) and part not in used and not part.endswith(".position_ids")
    ]
    wrong += [f"unexpected {part} {list(shapes[part].shape)}" for part in left]
    if wrong:
        wrong.sort(key=lambda line: line.split()[0])  # missing, unexpected, wrong
        raise UserError(f"{checkpoint.path}: {len(wrong)} tensors do not fit the model: {'; '.join(wrong)}")

    if dtype is None:
        for name in (name for name in used if shapes[name].dtype in FLOATS):
            dtype = shapes[name].dtype if dtype is None else torch.promote_types(dtype, shapes[name].dtype)
    state = {}
    for name in sorted(wanted, key=lambda name: sources[name].names):  # layers of one stack follow one another
        parts = [checkpoint.read(part) for part in sources[name].names]
        kind = dtype if wanted[name].dtype in FLOATS else None  # whole numbers stay what they are
        state[name] = sources[name].make(*parts).to(kind).contiguous()
    return {name: state[name] for name in wanted}


def load_same(checkpoint: Checkpoint, build: Callable[[], nn.Module], dtype: torch.dtype | None) -> nn.Module:
    """The model that `build` makes, with the tensors of the same names. Errors as `collect`."""
    with shapes_only():
        model = build()
    wanted = model.state_dict()
    tensors = collect(checkpoint, wanted, {name: same(name) for name in wanted}, dtype)
    model.load_state_dict(tensors, assign=True)
    return model


def need(checkpoint: Checkpoint, dims: Mapping[str, int]) -> list[tuple[int, ...]]:
    """The shapes of tensors that say how large a model is, each with so many dimensions.

    Raises:
        UserError: one is missing or has another number of dimensions.
    """
    if missing := [name for name in dims if name not in checkpoint.shapes]:
        raise UserError(f"{checkpoint.path}: missing {', '.join(missing)}, which say how large the model is")
    shapes = [tuple(checkpoint.shapes[name].shape) for name in dims]
    for (name, count), shape in zip(dims.items(), shapes, strict=True):
        if len(shape) != count:
            raise UserError(f"{checkpoint.path}: {name} must have {count} dimensions, got {list(shape)}")
    return shapes


def layers(names: Iterable[str], prefix: str) -> int:
    """How many numbered layers there are: 1 + the largest i of names that go on with i after `prefix`."""
    numbered = re.compile(re.escape(prefix) + r"(\d+)[./]")
    return 1 + max((int(found[1]) for name in names if (found := numbered.match(name))), default=-1)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)

"""The integers of a whole-number transformer: what they must fulfil, and their file.

D width   C channels   N tokens of a tile   H heads   M units of the MLP   K Gaussians   L levels of quality
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch
from safetensors.torch import save

from vlkern._files import write_file
from vlkern.codec.integer.arithmetic import RESIDUAL, WIDEST
from vlkern.errors import UserError
from vlkern.models.m2t import M2TConfig
from vlkern.models.state import Checkpoint, open_checkpoint

#: The file beside config.json and model.safetensors.
FILE = "integer.safetensors"
#: Symbols beyond +-SYMBOLS are embedded like +-SYMBOLS; they are coded as they are.
SYMBOLS = 2047
_INT32 = 1 << 31


@dataclass(frozen=True)
class Dense:
    """y = (W x + bias) multiplier / 2^shift within +-limit, or what the table has there."""

    weight: torch.Tensor
    bias: torch.Tensor
    multiplier: torch.Tensor
    shift: int
    limit: int
    table: torch.Tensor | None = None

    def check(self, name: str, inputs: int, outputs: int, largest: int, *, wide: bool = False) -> None:
        """For inputs up to +-largest, and results in int16 or, wide, in int32."""
        _is(f"{name}.weight", self.weight, torch.int8, (outputs, inputs))
        _is(f"{name}.bias", self.bias, torch.int32, (outputs,))
        _is(f"{name}.multiplier", self.multiplier, torch.int32, (outputs,))
        _range(f"{name}.shift", self.shift, 1, 62)
        _range(f"{name}.limit", self.limit, *((1 << 15, RESIDUAL) if wide else (1, 32767)))
        _range(f"{name}.multiplier", int(self.multiplier.min()), 0, _INT32 - 1)
        most = self.weight.long().abs().sum(1) * largest + self.bias.long().abs()
        _range(f"the sums of {name}", int(most.max()), 0, _INT32 - 1)
        if self.table is not None:
            _is(f"{name}.table", self.table, torch.int16, (2 * self.limit + 1,))


@dataclass(frozen=True)
class Norm:
    """LayerNorm, see `arithmetic.norm`."""

    gain: torch.Tensor
    bias: torch.Tensor
    shift: int
    limit: int
    epsilon: int

    def check(self, name: str, width: int) -> None:
        """For rows of `width` numbers up to +-RESIDUAL."""
        _is(f"{name}.gain", self.gain, torch.int32, (width,))
        _is(f"{name}.bias", self.bias, torch.int64, (width,))
        _range(f"the sizes of {name}.bias", int(self.bias.abs().max()), 0, 1 << 60)
        _range(f"{name}.shift", self.shift, 1, 60)
        _range(f"{name}.limit", self.limit, 1, 32767)
        _range(f"{name}.epsilon", self.epsilon, 1, 1 << 47)


@dataclass(frozen=True)
class Attention:
    """See `arithmetic.attention`."""

    shift: int
    multiplier: int
    out_shift: int
    limit: int

    def check(self, name: str) -> None:
        """For any queries and keys whose products are."""
        _range(f"{name}.shift", self.shift, 0, 30)
        _range(f"{name}.multiplier", self.multiplier, 0, _INT32 - 1)
        _range(f"{name}.out_shift", self.out_shift, 1, 62)
        _range(f"{name}.limit", self.limit, 1, 32767)


@dataclass(frozen=True)
class Layer:
    """x = x + out_proj(attention(qkv(norm1(x)))), then x = x + fc2(gelu(fc1(norm2(x)))): fc1's table is GELU."""

    norm1: Norm
    qkv: Dense
    attention: Attention
    out_proj: Dense
    norm2: Norm
    fc1: Dense
    fc2: Dense

    def check(self, name: str, config: M2TConfig) -> None:
        """For one layer of the transformer."""
        width, channels = config.width, config.width // config.heads
        self.norm1.check(f"{name}.norm1", width)
        self.qkv.check(f"{name}.qkv", width, 3 * width, self.norm1.limit)
        _range(f"the products of {name}'s queries and keys", self.qkv.limit**2 * channels, 0, (1 << 30) - 1)
        self.attention.check(f"{name}.attention")
        self.out_proj.check(f"{name}.out_proj", width, width, self.attention.limit, wide=True)
        self.norm2.check(f"{name}.norm2", width)
        self.fc1.check(f"{name}.fc1", width, config.mlp, self.norm2.limit)
        if self.fc1.table is None:
            raise ValueError(f"{name}.fc1 must have a table")
        self.fc2.check(f"{name}.fc2", config.mlp, width, int(self.fc1.table.long().abs().max()), wide=True)


@dataclass(frozen=True)
class Weights:
    """The whole transformer.

    embed   of symbols, C -> D
    mask    [D] int32, what stands for a token that is not known
    slots   [N, D] int32
    levels  [L, D] int32
    """

    embed: Dense
    mask: torch.Tensor
    slots: torch.Tensor
    levels: torch.Tensor
    layers: tuple[Layer, ...]
    norm: Norm
    head: Dense

    def check(self, config: M2TConfig) -> None:
        """That these are integers of this configuration, with which nothing overflows, whatever the symbols.

        Raises:
            ValueError: says what is not as it must be.
        """
        width = config.width
        _range("the width", width, 1, WIDEST)
        _range("the tokens of a tile", config.tokens, 1, (1 << 15) - 1)
        self.embed.check("embed", config.channels, width, SYMBOLS, wide=True)
        for name, shape in (("mask", (width,)), ("slots", (config.tokens, width)), ("levels", (config.levels, width))):
            table = getattr(self, name)
            _is(name, table, torch.int32, shape)
            _range(f"the sizes in {name}", int(table.long().abs().max()), 0, RESIDUAL)
        for i, layer in enumerate(self.layers):
            layer.check(f"layers.{i}", config)
        self.norm.check("norm", width)
        self.head.check("head", width, 3 * config.components * config.channels, self.norm.limit, wide=True)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of them by name, as they are saved; a number has no dimensions."""
        return dict(_tensors("", self))

    def save(self, folder: Path) -> Path:
        """Write `FILE` into a folder: safetensors, of integers only.

        Raises:
            UserError: it cannot be written.
        """
        path = Path(folder) / FILE
        write_file(path, save(self.tensors(), metadata={"format": "vlkern integer entropy model 1"}))
        return path

    @staticmethod
    def load(folder: Path, config: M2TConfig) -> "Weights":
        """Read `FILE` from a folder.

        Raises:
            UserError: it cannot be read, or `check` finds something.
        """
        path = Path(folder) / FILE
        checkpoint = open_checkpoint(path)
        try:
            names = set(checkpoint.shapes)
            weights: Weights = _build(Weights, "", checkpoint, names, config.depth)
            if names:
                raise ValueError(f"unexpected {', '.join(sorted(names))}")
            weights.check(config)
        except ValueError as error:
            raise UserError(f"{path}: no integers of this model ({error})") from error
        return weights


def mapped(part: Any, move: Callable[[torch.Tensor], torch.Tensor], prepare: Callable[[torch.Tensor], Any]) -> Any:
    """Weights, or a part of them, with other tensors: matrices by `prepare`, all others by `move`."""
    if isinstance(part, torch.Tensor):
        return move(part)
    if isinstance(part, tuple):
        return tuple(mapped(inner, move, prepare) for inner in part)
    if not dataclasses.is_dataclass(part):
        return part
    fields = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
    matrix = {"weight": prepare(fields.pop("weight"))} if isinstance(part, Dense) else {}
    kind: Any = type(part)
    return kind(**matrix, **{name: mapped(value, move, prepare) for name, value in fields.items()})


def _is(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")


def _range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}, got {value}")


def _tensors(prefix: str, part: Any) -> list[tuple[str, torch.Tensor]]:
    """Names and tensors; numbers become tensors without dimensions."""
    if isinstance(part, torch.Tensor):
        return [(prefix, part.cpu().contiguous())]
    if isinstance(part, int):
        return [(prefix, torch.tensor(part))]
    dot = f"{prefix}." if prefix else ""
    if isinstance(part, tuple):
        return [item for i, inner in enumerate(part) for item in _tensors(f"{dot}{i}", inner)]
    values = ((field.name, getattr(part, field.name)) for field in dataclasses.fields(part))
    return [item for name, value in values if value is not None for item in _tensors(dot + name, value)]


def _build(kind: Any, prefix: str, checkpoint: Checkpoint, left: set[str], depth: int) -> Any:
    """The inverse. Names that are used leave `left`."""
    if dataclasses.is_dataclass(kind):
        dot = f"{prefix}." if prefix else ""
        hints = get_type_hints(kind)
        return kind(**{name: _build(hint, dot + name, checkpoint, left, depth) for name, hint in hints.items()})  # type: ignore[operator]
    if kind == tuple[Layer, ...]:
        return tuple(_build(Layer, f"{prefix}.{i}", checkpoint, left, depth) for i in range(depth))
    if prefix not in left:
        if kind == torch.Tensor | None:
            return None
        raise ValueError(f"missing {prefix}")
    left.remove(prefix)
    tensor = checkpoint.read(prefix)
    if kind is not int:
        return tensor
    _is(prefix, tensor, torch.int64, ())
    return int(tensor)

"""Jet with big_vision's names, as in its .npz files: all couplings stacked along the first axis.

The permutations are stored there as dense matrices of zeros and ones, one of channels and one of tokens for every
coupling, of which it uses one and the other is zero: column m has its one in the row that goes to place m.
"""

import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from vlkern.errors import UserError
from vlkern.interop.big_vision import BLOCK, Table, linear, norm
from vlkern.layers.flow import SPLITS, token_order
from vlkern.layers.init import shapes_only
from vlkern.models.jet import Jet, JetConfig
from vlkern.models.state import Checkpoint, Source, collect, layers, need

#: What `load_pretrained` says of options for other models.
WHAT = "a flow for pictures of one size"
CHANNELS, TOKENS = "channel_coupling_masks-FREEZE_ME", "spatial_coupling_masks-FREEZE_ME"
_NETWORK = "couplings/dnn/"


def knows(names: Collection[str], entries: Mapping[str, Any]) -> bool:
    """Whether these are the arrays of a flow and nothing else."""
    root = _root(names)
    return root + CHANNELS in names and all(
        name.startswith((root + "couplings/", root + CHANNELS, root + TOKENS)) for name in names
    )


def load(
    checkpoint: Checkpoint, entries: Mapping[str, Any], where: Path, config: object, dtype: torch.dtype | None
) -> Jet:
    """The model of an .npz file.

    Args:
        checkpoint: its arrays.
        entries: unused: JAX checkpoints have no config.json.
        where: unused.
        config: the user's JetConfig, or None: then pictures are square and have three channels, and scales stay
            below 2.
        dtype: of the parameters; None keeps the file's.

    Raises:
        UserError: the arrays are not those of a Jet.
    """
    root = _root(checkpoint.shapes)
    orders = Orders(checkpoint)
    if config is None:
        config = config_of(orders, root)
    if not isinstance(config, JetConfig):
        raise UserError(f"{checkpoint.path} holds {WHAT}: config must be a JetConfig, got {type(config).__name__}")
    with shapes_only():
        model = Jet(config)
    tensors = collect(orders, model.state_dict(), sources(config, root), dtype, root)
    model.load_state_dict(tensors, assign=True)
    return model


class Orders:
    """A checkpoint whose matrices [L, n, n] of permutations have become orders [L, n] int32."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._inner, self.path = checkpoint, checkpoint.path
        self._read: dict[str, torch.Tensor] = {}
        self.shapes = dict(checkpoint.shapes)
        for name, tensor in self.shapes.items():
            if name.endswith((CHANNELS, TOKENS)) and tensor.dim() == 3:
                self.shapes[name] = torch.empty(tensor.shape[:2], dtype=torch.int32, device="meta")

    def read(self, name: str) -> torch.Tensor:
        """An order, kept once it was read, or any other array.

        Raises:
            UserError: a matrix is neither a permutation nor zero.
        """
        if not name.endswith((CHANNELS, TOKENS)):
            return self._inner.read(name)
        if name not in self._read:
            matrices = self._inner.read(name)
            ones = (matrices == 1).sum(1), (matrices == 1).sum(2)
            whole = torch.stack(ones).eq(1).all(2).all(0) & (matrices != 0).sum((1, 2)).eq(matrices.shape[1])
            if bool((wrong := ~whole & matrices.ne(0).any(2).any(1)).any()):
                i = int(wrong.nonzero()[0])
                raise UserError(f"{self.path}: {name}[{i}] must be a permutation or zero")
            # An order that is not used is -1 everywhere.
            self._read[name] = torch.where(whole[:, None], matrices.argmax(1), -1).int()
        return self._read[name]


def sources(c: JetConfig, root: str) -> dict[str, Source]:
    """Parameter of Jet -> arrays of an `Orders` whose names begin with `root`."""
    kinds = [c.kind(i) for i in range(c.depth)]
    networks = _from(c)
    found = {}
    for i, kind in enumerate(kinds):
        # Every array has to be asked for by one parameter, also one that no coupling uses.
        names = [CHANNELS, TOKENS] if kind == "channels" else [TOKENS, CHANNELS]
        found[f"couplings.{i}.order"] = Source(tuple(root + name for name in names), _layer(_first, i, c.depth))
        for ours, (theirs, layout) in networks.items():
            found[f"couplings.{i}.network.{ours}"] = Source((root + _NETWORK + theirs,), _layer(layout, i, c.depth))
    return found


def _from(c: JetConfig) -> Table:
    """Parameter of one network -> array and layout, but for the axis of the couplings."""
    table: Table = {
        **linear("init_proj", "init_proj"),
        "positions": ("posemb", lambda table: table.squeeze(0)),
        **norm("norm", "vit/encoder_norm"),
        **linear("final_proj", "final_proj"),
    }
    for j in range(c.block_depth):
        table |= {f"encoder.layers.{j}.{ours}": (f"vit/encoderblock_{j}/{b}", f) for ours, (b, f) in BLOCK.items()}
    if c.context is not None:
        attention = {ours: entry for ours, entry in BLOCK.items() if ours.startswith("self_attn.")}
        table |= {ours.replace("self_attn", "attention"): entry for ours, entry in attention.items()}
    return table


def _first(array: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    return array


def _layer(layout: Callable[..., torch.Tensor], i: int, depth: int) -> Callable[..., torch.Tensor]:
    def of_stacks(*stacks: torch.Tensor) -> torch.Tensor:
        if any(len(stack) != depth for stack in stacks):
            raise ValueError(f"expected {depth} couplings, got {[len(stack) for stack in stacks]}")
        return layout(*(stack[i] for stack in stacks))

    return of_stacks


def config_of(orders: Orders, root: str) -> JetConfig:
    """What the arrays whose names begin with `root` say, for square pictures with three channels and scales below 2.

    Raises:
        UserError: arrays are missing, or tell of no such flow.
    """
    network = root + _NETWORK
    query = f"{network}vit/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel"
    attend = f"{network}MultiHeadDotProductAttention_0/key/kernel"
    asked = {f"{network}posemb": 4, f"{network}final_proj/kernel": 3, query: 4, root + CHANNELS: 2, root + TOKENS: 2}
    (depth, _, tokens, width), (_, _, size), (_, _, heads, _), *_ = need(orders, asked)
    context = need(orders, {attend: 4})[0][1] if attend in orders.shapes else None
    grid, patch = math.isqrt(tokens), math.isqrt(size // 3)
    if grid**2 != tokens or 3 * patch**2 != size:
        raise UserError(
            f"{orders.path}: {tokens} tokens of {size} numbers are no square picture in three channels: pass config="
        )
    by_channels = (orders.read(root + CHANNELS) >= 0).all(1)
    by_tokens = orders.read(root + TOKENS)
    known = {tuple(token_order(grid, grid, split).tolist()): split for split in SPLITS} if tokens % 2 == 0 else {}
    kinds, splits = [], []
    for i in range(depth):
        kinds.append("channels" if bool(by_channels[i]) else "spatial")
        if not bool(by_channels[i]):
            splits.append(known.get(tuple(by_tokens[i].tolist()), SPLITS[0]))
    try:
        return JetConfig(
            grid * patch,
            patch,
            depth=depth,
            block_depth=layers(orders.shapes, f"{network}vit/encoderblock_"),
            width=width,
            heads=heads,
            kinds=_period(kinds),
            splits=_period(splits) or SPLITS,
            context=context,
        )
    except ValueError as error:
        raise UserError(f"{orders.path}: {error}") from error


def _period(names: list[str]) -> tuple[str, ...]:
    """The shortest part that gives the list when it is repeated."""
    for n in range(1, len(names)):
        if all(name == names[i % n] for i, name in enumerate(names)):
            return tuple(names[:n])
    return tuple(names)


def _root(names: Collection[str]) -> str:
    return "params/" if any(name.startswith("params/") for name in names) else ""

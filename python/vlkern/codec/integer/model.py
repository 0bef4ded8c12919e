"""The entropy model of M2T in whole numbers: every machine computes the same mixtures.

T tiles   n tokens of a step   m of the step before   C channels   K Gaussians   D width   N tokens of a tile
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from vlkern.codec.integer.arithmetic import RESIDUAL, powers
from vlkern.codec.integer.steps import choose
from vlkern.codec.integer.weights import SYMBOLS, Dense, Layer, Norm, Weights, mapped
from vlkern.coding import Mixtures
from vlkern.models.m2t import M2TConfig


@dataclass
class IntegerState:
    """Where a pass over T tiles is.

    level  of quality
    qkv    for each layer the queries, keys and values of the slots so far: int16 [T, N, 3 D]
    step   the next one
    end    slots so far
    """

    level: int
    qkv: list[torch.Tensor]
    step: int = 0
    end: int = 0


class IntegerEntropy:
    """The transformer of `vlkern.models.m2t` in integers: an EntropyModel with one result on all machines.

    The same mixtures come out whatever computes them: C++ with any instruction set and number of threads, or PyTorch
    on a CPU or a GPU, for any number of tiles at a time. See docs/codec-exactness.md.

    Args:
        config: of the model.
        weights: of `convert`, or `Weights.load`.
        device: where to compute.
        backend: "cpu" (C++), "reference" (PyTorch), or "auto": C++ where it can run.

    Raises:
        ValueError: the weights are not those of such a model, or no integers with which nothing overflows.

    Example:
        >>> entropy = IntegerEntropy.load("my-codec", model.config)
        >>> state = entropy.begin(tiles=2, level=3)
        >>> first = entropy.step(state, None, None)
    """

    def __init__(
        self, config: M2TConfig, weights: Weights, *, device: torch.device | str = "cpu", backend: str = "auto"
    ) -> None:
        if config.bidirectional:
            raise ValueError("config must be that of an M2T: there is no MT in integers")
        weights.check(config)
        self.config, self.device = config, torch.device(device)
        self._steps, self._powers = choose(self.device, backend), powers(self.device)
        self._weights: Weights = mapped(
            weights, lambda t: t.to(self.device), lambda matrix: self._steps.prepare(matrix.to(self.device))
        )

    @classmethod
    def load(
        cls, folder: str | Path, config: M2TConfig, *, device: torch.device | str = "cpu", backend: str = "auto"
    ) -> "IntegerEntropy":
        """From the folder of a model that has integers as well.

        Raises:
            UserError: they cannot be read, or are not those of this configuration.
        """
        return cls(config, Weights.load(Path(folder), config), device=device, backend=backend)

    def begin(self, tiles: int, level: int) -> IntegerState:
        """Before the first step.

        Args:
            tiles: T.
            level: of quality.

        Raises:
            ValueError: there are no tiles, or no such level.
        """
        c = self.config
        if tiles < 1:
            raise ValueError(f"tiles must be positive, got {tiles}")
        if not 0 <= level < c.levels:
            raise ValueError(f"level must be from 0 to {c.levels - 1}, got {level}")
        shape = (tiles, c.tokens, 3 * c.width)
        return IntegerState(level, [torch.empty(shape, dtype=torch.int16, device=self.device) for _ in range(c.depth)])

    def _dense(self, x: torch.Tensor, d: Dense) -> torch.Tensor:
        return self._steps.linear(x, d.weight, d.bias, d.multiplier, d.shift, d.limit, table=d.table)

    def _norm(self, x: torch.Tensor, n: Norm) -> torch.Tensor:
        return self._steps.norm(x, n.gain, n.bias, n.shift, n.limit, n.epsilon)

    def _inputs(self, state: IntegerState, tokens: torch.Tensor | None, known: torch.Tensor | None) -> torch.Tensor:
        """What the first layer takes: int32 [T, n, D]."""
        w, tiles, n = self._weights, len(state.qkv[0]), self.config.groups[state.step]
        x = w.mask.expand(tiles, n, -1).clone()
        if tokens is not None:
            symbols = tokens.to(self.device).clamp(-SYMBOLS, SYMBOLS).to(torch.int16)
            embedded = self._dense(symbols, w.embed)
            if known is not None:
                embedded = torch.where(known.to(self.device).unsqueeze(-1), embedded, w.mask)
            x[:, : tokens.shape[1]] = embedded
        return (x + w.slots[state.end : state.end + n] + w.levels[state.level]).clamp_(-RESIDUAL, RESIDUAL)

    def _layer(self, x: torch.Tensor, layer: Layer, qkv: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        a, heads = layer.attention, self.config.heads
        qkv[:, start:stop] = self._dense(self._norm(x, layer.norm1), layer.qkv)
        seen = self._steps.attention(
            qkv, start, stop, heads, a.shift, self._powers, a.multiplier, a.out_shift, a.limit
        )  # fmt: skip
        x = (x + self._dense(seen, layer.out_proj)).clamp_(-RESIDUAL, RESIDUAL)
        hidden = self._dense(self._norm(x, layer.norm2), layer.fc1)
        return (x + self._dense(hidden, layer.fc2)).clamp_(-RESIDUAL, RESIDUAL)

    @torch.no_grad()
    def step(self, state: IntegerState, tokens: torch.Tensor | None, known: torch.Tensor | None) -> Mixtures:
        """The mixtures of the next group, n tokens of each tile.

        Args:
            state: from `begin`; it is changed.
            tokens: [T, m, C] int32, those of the group before; None at the first step.
            known: [T, m] bool, false for tokens outside of the picture. None: all are inside.

        Returns:
            means int32, scales uint8, weights int16, each [T, n, K, C] on the CPU.

        Raises:
            ValueError: there is no further step, or the tokens are not those of the group before.
        """
        c = self.config
        if state.step == len(c.groups):
            raise ValueError(f"there are only {state.step} steps")
        shape = (len(state.qkv[0]), c.groups[state.step - 1], c.channels) if state.step else None
        if (tokens is None) != (shape is None) or (tokens is not None and tuple(tokens.shape) != shape):
            got = None if tokens is None else list(tokens.shape)
            raise ValueError(f"tokens must be {shape and list(shape)} at step {state.step}, got {got}")
        start, stop = state.end, state.end + c.groups[state.step]
        x = self._inputs(state, tokens, known)
        for layer, qkv in zip(self._weights.layers, state.qkv, strict=True):
            x = self._layer(x, layer, qkv, start, stop)
        raw = self._dense(self._norm(x, self._weights.norm), self._weights.head)
        parts = self._steps.mixture(raw.unflatten(-1, (3, c.components, c.channels)), self._powers)
        state.step, state.end = state.step + 1, stop
        return Mixtures(*(part.cpu() for part in parts))

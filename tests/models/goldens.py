"""Arrays that the papers' JAX code computed: the towers that a file describes, and comparison."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rooms import ROOT
from torch import nn

from vlkern.models.siglip import TextConfig, VisionConfig
from vlkern.models.state import Source, collect


class Golden:
    """One file of tests/golden."""

    def __init__(self, name: str) -> None:
        self.path = ROOT / "tests/golden" / f"{name}.npz"
        with np.load(self.path) as file:
            self.arrays = {key: file[key] for key in file.files}
        self.config = json.loads(str(self.arrays.pop("config")))

    def __getitem__(self, key: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[key])

    def pixels(self) -> torch.Tensor:
        return self["in/image"].permute(0, 3, 1, 2)

    def ids(self) -> torch.Tensor:
        return self["in/text"].long()

    def state(self, root: str, sources: Mapping[str, Source], like: nn.Module) -> dict[str, torch.Tensor]:
        """The arrays under `root` as the state of a module, as far as `sources` go."""
        arrays = {key: array for key, array in self.arrays.items() if key.startswith(root)}
        wanted = {name: tensor for name, tensor in like.state_dict().items() if name in sources}
        return collect(Arrays(self.path, arrays), wanted, sources, root="nothing is left over: ")


class Arrays:
    """A checkpoint in memory."""

    def __init__(self, path: Path, arrays: Mapping[str, np.ndarray]) -> None:
        self.path = path
        self._arrays = arrays
        self.shapes = {name: torch.from_numpy(array).to("meta") for name, array in arrays.items()}

    def read(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self._arrays[name])


def _sizes(c: Mapping[str, Any]) -> dict[str, int]:
    return {"width": c["width"], "depth": c["depth"], "heads": c["num_heads"], "mlp": c["mlp_dim"] or 4 * c["width"]}


def vision_config(c: Mapping[str, Any], size: tuple[int, int]) -> VisionConfig:
    return VisionConfig(**_sizes(c), image_size=size, patch=c["patch_size"][0])


def text_config(c: Mapping[str, Any], length: int) -> TextConfig:
    return TextConfig(**_sizes(c), vocabulary=c["vocab_size"], length=length)


def assert_close(got: torch.Tensor, expected: torch.Tensor, tolerance: float, span: float | None = None) -> None:
    """The largest error, relative to the largest entry of the array or to `span`, is at most `tolerance`."""
    assert got.shape == expected.shape
    span = float(expected.abs().max()) if span is None else span
    error = float((got.detach() - expected).abs().max())
    assert error <= tolerance * span, f"error {error:.3e} exceeds {tolerance} * {span:.3e}"


def assert_gradients(modules: Mapping[str, nn.Module], expected: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """Every parameter's gradient, relative to the largest entry of all."""
    span = max(float(g.abs().max()) for state in expected.values() for g in state.values())
    for key, module in modules.items():
        gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        assert gradients.keys() == expected[key].keys()
        for name, gradient in expected[key].items():
            assert_close(gradients[name], gradient, 5e-5, span)

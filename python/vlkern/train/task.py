"""What the loop needs to know of a system. A recipe provides it; the loop knows nothing else."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import nn


class Task(Protocol):
    """A model, its loss and its data.

    model      what checkpoints hold
    objective  module that contains the model; its forward takes a batch and gives this rank's loss []. The mean over
               ranks is the loss of the global batch, and so is the mean of its gradients
    """

    model: nn.Module
    objective: nn.Module

    def blocks(self) -> Sequence[nn.Module]:
        """The parts whose parameters FSDP gathers one after the other."""

    def optimizer(self) -> torch.optim.Optimizer:
        """Made after the model was spread over the ranks. Each group has a "multiple" of the learning rate."""

    def rate(self, number: int) -> float:
        """Learning rate of step `number`, counted from 0."""

    def batches(self, start: int) -> Iterator[tuple[torch.Tensor, ...]]:
        """This rank's part of the global batches number `start`, `start` + 1, ...: a function of seed and number."""

    def prepare(self, batch: tuple[torch.Tensor, ...], number: int) -> tuple[torch.Tensor, ...]:
        """A batch as the objective takes it, on the device; chance depends on seed and number alone."""

    def numbers(self) -> dict[str, float]:
        """What the log should say about the model. Called on every rank."""

    def save(self, weights: dict[str, torch.Tensor], folder: Path) -> None:
        """Write the trained model; `weights` is its full state dict. Called on one rank."""

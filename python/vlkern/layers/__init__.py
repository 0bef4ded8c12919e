"""The parts that models share: attention, MLP, pooling head, quantizer, initialisation."""

from vlkern.layers.fsq import FSQ

__all__ = ["FSQ"]

"""Ragged examples packed side by side: which go together, what they carry, and a detector of leaks between them."""

from vlkern.packing.bins import METHODS, Packing, pack

__all__ = ["METHODS", "Packing", "pack"]

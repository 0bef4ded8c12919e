"""Ragged examples packed side by side: which go together, what they carry, and a detector of leaks between them."""

from vlkern.packing.batch import Example, PackedBatch, Parts, Spans
from vlkern.packing.bins import METHODS, Packing, pack
from vlkern.packing.isolation import IsolationError, Leak, check_isolation
from vlkern.packing.stream import packed_batches

__all__ = [
    "METHODS",
    "Example",
    "IsolationError",
    "Leak",
    "PackedBatch",
    "Packing",
    "Parts",
    "Spans",
    "check_isolation",
    "pack",
    "packed_batches",
]

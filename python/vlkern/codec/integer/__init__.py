"""The entropy model in integers: one result on every machine; see docs/codec-exactness.md."""

from vlkern.codec.integer.convert import Latents, convert
from vlkern.codec.integer.model import IntegerEntropy, IntegerState
from vlkern.codec.integer.weights import Weights

__all__ = ["IntegerEntropy", "IntegerState", "Latents", "Weights", "convert"]

"""Entropy coding: integers to bytes and back, exactly, at about the length that their probabilities allow."""

from vlkern.coding.errors import DamagedStream
from vlkern.coding.mixtures import Mixtures, quantize_mixture
from vlkern.coding.rans import (
    Decoder,
    Encoder,
    decode,
    decode_mixtures,
    encode,
    encode_mixtures,
)
from vlkern.coding.tables import SCALES, Tables, gaussian_tables, scale_index, tables_from_pmfs

__all__ = [
    "SCALES",
    "DamagedStream",
    "Decoder",
    "Encoder",
    "Mixtures",
    "Tables",
    "decode",
    "decode_mixtures",
    "encode",
    "encode_mixtures",
    "gaussian_tables",
    "quantize_mixture",
    "scale_index",
    "tables_from_pmfs",
]

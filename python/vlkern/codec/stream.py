"""Tokens of some tiles to the bytes of a segment and back: one walk over the steps, for encoder and decoder.

T tiles   N tokens of a tile   C channels   n tokens of a step, in each tile   M of them that lie in the picture
"""

import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from vlkern import ops
from vlkern.codec.entropy import EntropyModel
from vlkern.codec.errors import DamagedFile, Mismatch
from vlkern.coding import SCALES, DamagedStream, Decoder, Encoder, Mixtures

#: Interleaved states of a segment's stream.
LANES = 2
_STRANGE = "the bytes are whole, but the probabilities computed here are not those with which they were written"


class Segment(NamedTuple):
    """Some tiles as they lie in a file.

    stream    of `vlkern.coding`
    checksum  of what was coded, and with which probabilities
    """

    stream: bytes
    checksum: int


def _walk(
    entropy: EntropyModel,
    level: int,
    valid: torch.Tensor,
    code: Callable[[slice, Mixtures], torch.Tensor],
    checksum: int,
) -> int:
    """Go through the steps.

    Args:
        entropy: of the tokens.
        level: of quality.
        valid: [T, N] bool, which tokens are in the picture; no others are coded.
        code: (the step's tokens, mixtures of M tokens) -> their symbols [M, C], which it writes or reads.
        checksum: of what comes before.

    Returns:
        CRC-32 of, step after step, means, scales, weights and symbols of its M tokens, little-endian.
    """
    state, end = entropy.begin(len(valid), level), 0
    tokens: torch.Tensor | None = None
    known: torch.Tensor | None = None
    for n in entropy.config.groups:
        step = slice(end, end + n)
        mixtures = entropy.step(state, tokens, known)
        known = valid[:, step]
        mixtures = Mixtures(*(part[known] for part in mixtures))
        symbols = code(step, mixtures)
        for part, dtype in zip((*mixtures, symbols), ("<i4", "|u1", "<i2", "<i4"), strict=True):
            checksum = zlib.crc32(np.ascontiguousarray(part.numpy(), dtype=dtype).data, checksum)
        tokens = symbols.new_zeros(*known.shape, entropy.config.channels)
        tokens[known] = symbols
        end += n
    return checksum


def encode_segment(
    entropy: EntropyModel, level: int, tokens: torch.Tensor, valid: torch.Tensor, checksum: int
) -> Segment:
    """Compress tiles.

    Args:
        entropy: gives the probabilities.
        level: of quality.
        tokens: [T, N, C] int32, in the order of the coding.
        valid: [T, N] bool, which of them are in the picture.
        checksum: with which the segment's own begins, so that it belongs to its place in one file.
    """
    encoder = Encoder(lanes=LANES)

    def code(step: slice, mixtures: Mixtures) -> torch.Tensor:
        symbols = tokens[:, step][valid[:, step]]
        encoder.put_mixtures(symbols, mixtures)
        return symbols

    checksum = _walk(entropy, level, valid, code, checksum)
    return Segment(encoder.finish(), checksum)


def _bits(symbols: torch.Tensor, mixtures: Mixtures) -> torch.Tensor:
    """Of M tokens: what their symbols [M, C] take, without the rounding of frequencies."""
    weights, scales = mixtures.weights / 4096, torch.tensor(SCALES)[mixtures.scales.long()]
    params = torch.stack([weights.clamp(min=1e-9).log(), mixtures.means / 256, scales.log()], -3)
    return ops.mixture_bits(symbols.float(), params).sum(-1)


def decode_segment(
    entropy: EntropyModel,
    level: int,
    segment: Segment,
    valid: torch.Tensor,
    checksum: int,
    bits_TN: torch.Tensor | None = None,
) -> torch.Tensor:
    """The tokens [T, N, C] int32 of `encode_segment`, zeros outside of the picture.

    Args:
        entropy, level, valid, checksum: as there.
        segment: whose bytes are known to be whole.
        bits_TN: if given, gets the bits of each token, float32.

    Raises:
        DamagedFile: no encoder wrote this.
        Mismatch: the probabilities are not those of the encoder.
    """
    found = torch.zeros(*valid.shape, entropy.config.channels, dtype=torch.int32)

    def code(step: slice, mixtures: Mixtures) -> torch.Tensor:
        symbols = decoder.get_mixtures(mixtures)
        found[:, step][valid[:, step]] = symbols
        if bits_TN is not None:
            bits_TN[:, step][valid[:, step]] = _bits(symbols, mixtures)
        return symbols

    try:
        decoder = Decoder(segment.stream, lanes=LANES)
    except DamagedStream as error:
        raise DamagedFile(str(error)) from error
    try:
        checksum = _walk(entropy, level, valid, code, checksum)
        decoder.finish()
    except DamagedStream as error:
        raise Mismatch(_STRANGE) from error
    if checksum != segment.checksum:
        raise Mismatch(_STRANGE)
    return found

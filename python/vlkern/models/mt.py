"""MT's coding of tiles: in each of S steps a pass over all tokens, those that are known and masks for the others.

    schedule   which n of the unknown tokens a step codes, for groups of n tokens as M2T's:
    qlds       the next of the low-discrepancy order, the same in every tile
    entropy    those of the fewest expected bits, which the decoder finds as well: they depend on what is known already

Encoder and decoder run the same steps: `predict` says where and with which probabilities, then the tokens of these
places are coded, and `reveal` hears them.

    T tiles   N tokens of a tile   n of a step   C channels   K Gaussians

Source: Mentzer, Agustsson, Tschannen, M2T: Masking Transformers Twice for Faster Decoding, 2023, section 3.
"""

import math

import torch

from vlkern import ops
from vlkern.models.m2t import EntropyTransformer

SCHEDULES = ("qlds", "entropy")
#: Points of each Gaussian, equally likely, for which bits are counted.
POINTS = 8


def expected_bits(params: torch.Tensor) -> torch.Tensor:
    """About the entropy of rounded symbols: the mean of their bits over points of all Gaussians.

    Each Gaussian stands for `POINTS` symbols: its quantiles (j + 1/2) / POINTS, rounded.

    Args:
        params: [..., 3, K, C], as ops.mixture_bits takes them.

    Returns:
        [..., C].
    """
    logits, means, raw = params.unbind(-3)
    scales = raw.clamp(math.log(0.11), math.log(256)).exp()
    weights = logits.softmax(-2)
    levels = (torch.arange(POINTS, dtype=torch.float64) + 0.5) / POINTS
    total = torch.zeros_like(means[..., 0, :])
    for quantile in torch.special.ndtri(levels).tolist():
        symbols = (means + quantile * scales).round()
        for k in range(symbols.shape[-2]):
            total = total + weights[..., k, :] * ops.mixture_bits(symbols[..., k, :], params)
    return total / POINTS


class MaskedSteps:
    """The steps of T tiles: `predict` and `reveal` in turn, S times.

    Args:
        model: the transformer of MT.
        tiles: T.
        quality: [D] of the level, from `M2T.quality`.
        schedule: "qlds" or "entropy".

    Raises:
        ValueError: there is no such schedule, or the transformer is M2T's.

    Example:
        >>> model = vlkern.models.M2T(dataclasses.replace(config, bidirectional=True))
        >>> steps = MaskedSteps(model.entropy, 1, model.quality(2), "entropy")
        >>> places, params = steps.predict()
    """

    def __init__(self, model: EntropyTransformer, tiles: int, quality: torch.Tensor, schedule: str = "qlds") -> None:
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule must be 'qlds' or 'entropy', got {schedule!r}")
        c = model.config
        if not c.bidirectional:
            raise ValueError("the config must have bidirectional=True: M2T codes with a StepCache")
        device = quality.device
        self.model, self.quality, self.schedule = model, quality, schedule
        self.tokens = torch.zeros(tiles, c.tokens, c.channels, device=device, dtype=quality.dtype)
        self.known = torch.zeros(tiles, c.tokens, dtype=torch.bool, device=device)
        self.coded = torch.zeros_like(self.known)
        self.places = torch.empty(tiles, 0, dtype=torch.int64, device=device)
        self.step = self.end = 0

    @torch.no_grad()
    def predict(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Places [T, n] of the next tokens in the tiles' coding order, and their parameters [T, n, 3, K, C]."""
        n = self.model.config.groups[self.step]
        params = self.model.forward_masked(self.tokens, self.quality, self.known)
        if self.schedule == "qlds":
            self.places = torch.arange(self.end, self.end + n, device=self.known.device).expand(len(self.known), n)
        else:
            bits = expected_bits(params.float()).sum(-1).masked_fill(self.coded, math.inf)
            self.places = bits.sort(dim=1, stable=True).indices[:, :n]
        self.step, self.end = self.step + 1, self.end + n
        rows = torch.arange(len(params), device=params.device).unsqueeze(1)
        return self.places, params[rows, self.places]

    def reveal(self, tokens_TnC: torch.Tensor, known_Tn: torch.Tensor | None = None) -> None:
        """The symbols of the places that `predict` gave.

        Args:
            tokens_TnC: symbols.
            known_Tn: bool, False for tokens outside of the picture, which stay masks. None: all are there.
        """
        rows = torch.arange(len(self.known), device=self.known.device).unsqueeze(1)
        self.tokens[rows, self.places] = tokens_TnC.to(self.tokens.dtype)
        self.known[rows, self.places] = True if known_Tn is None else known_Tn
        self.coded[rows, self.places] = True

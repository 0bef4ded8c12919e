"""Masks of attention whose every row is one interval of keys: lazy, composable, O(N); docs/masks.md draws them."""

from vlkern.masks._kinds import causal, cross, documents, groups, prefix, spans, window
from vlkern.masks._mask import Mask
from vlkern.masks._picture import draw

__all__ = ["Mask", "causal", "cross", "documents", "draw", "groups", "prefix", "spans", "window"]

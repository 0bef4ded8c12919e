"""Boxes and masks as PaliGemma writes them: out of generated text, into text, and onto the picture.

`parse` reads what a model wrote, `masks.MaskVae` turns sixteen tokens into a mask and back, `draw` shows both.
"""

from vlkern.boxes.draw import draw
from vlkern.boxes.masks import MaskVae, crop_mask, load_mask_vae, paste_mask
from vlkern.boxes.text import Answer, Box, Detection, bins, parse, to_text, unbin

__all__ = [
    "Answer",
    "Box",
    "Detection",
    "MaskVae",
    "bins",
    "crop_mask",
    "draw",
    "load_mask_vae",
    "parse",
    "paste_mask",
    "to_text",
    "unbin",
]

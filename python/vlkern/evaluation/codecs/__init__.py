"""Rate and distortion: how small files are at which quality, beside the formats that everybody has."""

from vlkern.evaluation.codecs.bjontegaard import Curve, Saving, bd_rate
from vlkern.evaluation.codecs.contestants import Contestant, rivals
from vlkern.evaluation.codecs.measure import Point, measure
from vlkern.evaluation.codecs.quality import ms_ssim, psnr

__all__ = ["Contestant", "Curve", "Point", "Saving", "bd_rate", "measure", "ms_ssim", "psnr", "rivals"]

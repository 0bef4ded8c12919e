"""Pictures to small files and back, by a model: the files of `vlkern compress`."""

from vlkern.codec.codec import Codec, load
from vlkern.codec.compress import compress
from vlkern.codec.decompress import decompress
from vlkern.codec.errors import DamagedFile, Mismatch

__all__ = ["Codec", "DamagedFile", "Mismatch", "compress", "decompress", "load"]

"""Key/value caches of decoders: linear for global layers, rings for local ones. docs/caches.md explains them.

Shape letters: T packed tokens of all rows of a chunk, B rows (sequences), L tokens of a row in a chunk, S slots of a
row, H query heads, K key heads, C head dim.
"""

from vlkern.caches.chunk import Chunk
from vlkern.caches.linear import LinearCache
from vlkern.caches.model import Caches
from vlkern.caches.ring import RingCache

__all__ = ["Caches", "Chunk", "LinearCache", "RingCache"]

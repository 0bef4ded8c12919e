"""Search of pictures by words: an index of embeddings, the best hits for a text, and a page that shows them."""

from vlkern.search.hits import Hit, best
from vlkern.search.index import Index, build, load_index, save_index

__all__ = ["Hit", "Index", "best", "build", "load_index", "save_index"]

"""Tokens become text: never half a character, never a part of a stop string."""

import codecs
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlkern.data.vocabulary import Vocabulary


def check_stops(stop: str | Sequence[str]) -> tuple[str, ...]:
    """One string or several as a tuple. Raises TypeError or ValueError for what cannot be searched."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    for text in stops:
        if not isinstance(text, str):
            raise TypeError(f"stop must be strings, got {type(text).__name__}")
        if not text:
            raise ValueError("stop must be strings that are not empty, got ''")
    return stops


class TextStream:
    """The text of one answer, token by token.

    Reading character by character, the first stop string to be complete ends the text, which is cut before it; of those
    complete at the same character the longest counts. So it does not matter how the text is cut into tokens. What may
    still become a stop string, and a character whose bytes are not all there, are held back.

    Args:
        vocabulary: knows the bytes of a token.
        stops: strings that end the text.
        show: is called with each piece of text that is final.

    Example:
        >>> stream = TextStream(vlkern.data.load_vocabulary("bytes"), ["END"], print)
        >>> stopped = [stream.push(ord(letter) + 3) for letter in "catsENDs"]
        c
        a
        t
        s
        >>> stream.text, stopped.index(True)
        ('cats', 6)
    """

    def __init__(
        self, vocabulary: "Vocabulary", stops: Sequence[str] = (), show: Callable[[str], None] | None = None
    ) -> None:
        self._piece, self._stops, self._show = vocabulary.piece, tuple(stops), show
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = vocabulary.blank
        self._held = ""
        self._parts: list[str] = []

    @property
    def text(self) -> str:
        """What has been shown so far; after `end` everything."""
        return "".join(self._parts)

    def push(self, token: int) -> bool:
        """The next token; True if a stop string is complete with it: then nothing may follow."""
        return self._add(self._decoder.decode(self._piece(token)))

    def end(self) -> None:
        """No token follows: show what was held back. Bytes that are no character become U+FFFD."""
        self._add(self._decoder.decode(b"", final=True))
        self._emit(len(self._held))

    def _add(self, new: str) -> bool:
        if self._strip and new:
            new, self._strip = new.removeprefix(" "), False
        self._held += new
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self._held = self._held[: min(found)[1]]
            self._emit(len(self._held))
            self._stops = ()
            return True
        self._emit(len(self._held) - self._waiting())
        return False

    def _waiting(self) -> int:
        """How many characters at the end begin a stop string."""
        longest = max(map(len, self._stops), default=1)
        for count in range(min(longest - 1, len(self._held)), 0, -1):
            tail = self._held[-count:]
            if any(stop.startswith(tail) for stop in self._stops):
                return count
        return 0

    def _emit(self, count: int) -> None:
        if count:
            text, self._held = self._held[:count], self._held[count:]
            self._parts.append(text)
            if self._show is not None:
                self._show(text)


def check_callback(callback: object) -> None:
    """Raise TypeError unless it can be called."""
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be a function of row and text, got {type(callback).__name__}")

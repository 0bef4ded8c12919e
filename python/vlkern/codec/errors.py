"""What can be wrong with a compressed picture."""

from vlkern.errors import UserError


class DamagedFile(UserError):
    """Bytes that no encoder wrote: cut short, changed, continued, or something else altogether."""


class Mismatch(UserError):
    """A whole file that cannot be read here: it is of another model, of a newer format, or the probabilities that this
    machine computes are not those with which it was written."""

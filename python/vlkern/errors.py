"""The error that the command line prints as one line."""


class UserError(ValueError):
    """What the user gave cannot be used. The message is one line that says what was expected and what came."""

"""What defines a run: written to config.json when it begins, and kept when it is resumed."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlkern.errors import UserError


def _plain(value: Any) -> Any:
    """As JSON gives it back; paths no longer depend on the current folder."""
    if isinstance(value, Path):
        return str(value.absolute())
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


class Settings:
    """The options that define a run, by name: as stored when it began, or as given, or by default.

    Args:
        args: parsed options; None means that an option was not given.
        names: those that define the run.
        stored: of the run that is resumed; None for a new one.
        moved: options that may be given anew, because what they lead to is checked otherwise.

    Raises:
        UserError: an option is given that differs from the stored one.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        names: Sequence[str],
        stored: dict[str, Any] | None,
        *,
        moved: Sequence[str] = (),
    ) -> None:
        given = {name: _plain(getattr(args, name)) for name in names}
        self._fixed = stored is not None
        self.values: dict[str, Any] = given if stored is None else dict(stored)
        for name, value in given.items():
            if name not in moved and value is not None:
                self.compare(name, value)

    def compare(self, name: str, value: Any) -> None:
        """Raise UserError if the run that is resumed began with another value."""
        if self._fixed and value != self.values.get(name):
            option = "--" + name.rstrip("_").replace("_", "-")
            raise UserError(
                f"{option} {_shown(value)}: the run began with {_shown(self.values.get(name))}; leave it out, or begin "
                "a new run from its model with --from"
            )

    def settle(self, name: str, default: Any) -> None:
        """The value of an option of a new run that was not given."""
        if not self._fixed and self.values[name] is None:
            self.values[name] = default

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

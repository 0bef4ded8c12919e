"""The device that an option names."""

import torch

from vlkern.errors import UserError


def device_of(name: str | None) -> str:
    """`name` as it is, if something can be put there; without one the GPU, if there is one.

    Raises:
        UserError: this machine has no such device.
    """
    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: not available ({next(iter(str(error).splitlines()), '')})") from error
    return device

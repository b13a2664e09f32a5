"""Where tensors shall lie, as a person names it: one check for every command, with a message instead of a traceback."""

import torch

from poet.errors import ConfigError

__all__ = ["parse_device"]


def parse_device(name: str | torch.device) -> torch.device:
    """The device of that name, if this machine has it.

    Args:
        name: "cpu", "cuda", "cuda:1", ...

    Raises:
        ConfigError: there is no such device, or not on this machine.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device must be cpu, cuda or cuda:NUMBER, got {name!r}.") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be cpu, cuda or cuda:NUMBER, got {str(name)!r}.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device must be cpu or one of {torch.cuda.device_count()} GPUs here, got {str(name)!r}.")
    return device

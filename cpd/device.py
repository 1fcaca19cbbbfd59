"""Where tensors live."""

from __future__ import annotations

import torch

from cpd.comm import Comm


def choose_device(comm: Comm) -> torch.device:
    """This rank's accelerator if there is any, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", comm.rank % torch.cuda.device_count())
    return torch.device("cpu")

"""A function that works in place, recorded as CUDA graphs: what is many short kernels becomes one launch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Graphed:
    """Calls of a function that reads and writes the same tensors every time.

    On an accelerator a variant (the arguments of a call) runs as it is when it is met first, which lets libraries
    and optimisers set themselves up, and from the second time on as a recorded graph. On the CPU it always runs as
    it is. Call `forget` when tensors that the function uses have been replaced by others.

    Args:
        function: takes flags that decide which kernels it launches; returns a new tensor or None. It must not wait
            for the device, nor depend on anything but its flags and the contents of tensors that stay in place.
        device: where these are.
    """

    def __init__(self, function: Callable[..., Tensor | None], device: torch.device) -> None:
        #: Whether it records; optimisers that the function steps must be `capturable` then.
        self.records = device.type == "cuda"
        self._function = function
        self._met: set[tuple[bool, ...]] = set()
        self._graphs: dict[tuple[bool, ...], tuple[torch.cuda.CUDAGraph, Tensor | None]] = {}

    def __call__(self, *flags: bool) -> Tensor | None:
        """The function's result for these flags."""
        if not self.records or flags not in self._met:
            self._met.add(flags)
            return self._function(*flags)
        if flags not in self._graphs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                recorded = self._function(*flags)
            self._graphs[flags] = graph, recorded
        graph, result = self._graphs[flags]
        graph.replay()
        # The next replay writes into the same memory.
        return None if result is None else result.clone()

    def forget(self) -> None:
        """Record anew."""
        self._met.clear()
        self._graphs.clear()

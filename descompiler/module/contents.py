"""What a module holds, found once: walking through its submodules takes thousands of calls, and a step asks often.

`Contents` is what `named_modules`, `named_parameters` and `named_buffers` find, for as long as every module holds the
same objects under the same names. `Moment` is what a step's program depends on and users change between steps: training
flags, which parameters are trained, dtypes, devices. A step as the one before has the same `Moment`, and what was
computed of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Contents:
    """The modules, parameters and buffers of a module, by name.

    Attributes
    ----------
    parameters, buffers : dict
        Each once, under its first name.
    every_parameter, every_buffer : dict
        Under each of their names.
    """

    def __init__(self, module: nn.Module, flags: Sequence[str]):
        self.parameters: dict[str, nn.Parameter] = dict(module.named_parameters())
        self.every_parameter: dict[str, nn.Parameter] = dict(module.named_parameters(remove_duplicate=False))
        self.buffers: dict[str, Tensor] = dict(module.named_buffers())
        self.every_buffer: dict[str, Tensor] = dict(module.named_buffers(remove_duplicate=False))
        modules = dict(module.named_modules(remove_duplicate=False))
        self._flagged = [modules[name] for name in flags if name in modules]
        inside = [m for _, m in module.named_modules()]
        held: list[dict[str, Any]] = [d for m in inside for d in (m._modules, m._parameters, m._buffers)]
        self._held = [(d, [*d], [*map(id, d.values())]) for d in held]
        self._kept = [[*d.values()] for d in held]  # so that nothing else gets their ids
        self._tensors = [*self.parameters.values()]
        self._buffer_list = [*self.buffers.values()]
        self._moment = Moment((), (), (), (), ())

    def is_current(self) -> bool:
        """Whether every module holds what it held. Objects are told by their ids: what compares them is C."""
        for held, names, ids in self._held:
            if (held or names) and ([*held] != names or [*map(id, held.values())] != ids):  # most hold nothing
                return False
        return True

    def moment(self) -> Moment:
        """What a step's program depends on, now; the same object as long as it is the same."""
        with torch._C.DisableTorchFunctionSubclass():  # of a piece, its own
            found = (
                [m.training for m in self._flagged],
                [p.requires_grad for p in self._tensors],
                [p.dtype for p in self._tensors],
                [b.dtype for b in self._buffer_list],
                [p.device for p in self._tensors],
            )
        if found != self._moment.found:
            self._moment = Moment(*found)
        return self._moment


class Moment:
    """Training flags by module, of each parameter whether it is trained, its dtype and device, and buffers' dtypes.

    ``known`` is for what was computed of it.
    """

    def __init__(
        self,
        training: Sequence[bool],
        trained: Sequence[bool],
        dtypes: Sequence[torch.dtype],
        buffer_dtypes: Sequence[torch.dtype],
        devices: Sequence[torch.device],
    ):
        self.found = training, trained, dtypes, buffer_dtypes, devices
        self.flags = tuple(training)
        self.trained, self.held = list(trained), (*dtypes, *buffer_dtypes)
        self.dtypes = tuple(d for d in dtypes if d.is_floating_point or d.is_complex)
        self.known: dict[Any, Any] = {}

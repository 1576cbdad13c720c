"""The way back to one process: the original with the weights of now, and predictions of all ranks together."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from descompiler.errors import InputError
from descompiler.model.attributes import copy_with, set_attributes
from descompiler.module.dynamic import in_their_places, tables_of
from descompiler.module.installed import module_of
from descompiler.module.state import full_state_dict, set_extra
from descompiler.runtime.agreement import say
from descompiler.runtime.collectives import all_gather


def to_single(module: nn.Module) -> nn.Module | None:
    """The original model, of its own class, with the weights and buffers that the compiled one has now.

    Collective: every rank calls it. Weights are streamed: rank 0 alone holds the whole, in the memory of the CPU.

    Returns
    -------
    torch.nn.Module on rank 0, None on the others

    Raises
    ------
    PlanError
        On every rank, if rank 0 has not the memory for the whole.
    """
    compiled = module_of(module)
    state = full_state_dict(compiled, rank0_only=True)
    if compiled._runtime.rank:
        return None
    original: nn.Module = vars(compiled)["_original"]
    tables = {n: part.part_of(None, 0) for n, part in tables_of(compiled).items()}
    for name, table in tables.items():
        table.load_state_dict({n.removeprefix(f"{name}."): x for n, x in state.items() if n.startswith(f"{name}.")})
    result = copy_with(original, state, in_their_places(original, tables))
    with torch.no_grad():
        for name, buffer in result.named_buffers():
            if name in state:
                buffer.copy_(state[name])
    set_attributes(result, compiled._attributes.values())
    set_extra(result, state)
    now = dict(compiled.named_modules())
    for name, m in result.named_modules():
        m.training = now[name].training
    return result


def gather_rows(module: nn.Module, rows: Tensor) -> Tensor:
    """The rows of all ranks, in the order of ranks: predictions of batches of any sizes, to be judged together.

    Collective: every rank calls it. It sends no gradients back.

    Parameters
    ----------
    module : DistributedModule, or a model that was compiled in place
    rows : Tensor
        ``[b, ...]``, b of each rank's own.

    Returns
    -------
    Tensor
        ``[sum of b, ...]``, on every rank.

    Raises
    ------
    InputError
        On every rank, if ranks have rows of other shapes or dtypes.
    """
    runtime = module_of(module)._runtime
    if runtime.ranks == 1:
        return rows.detach()
    runtime.meet_between_steps("des.gather_rows")
    told = say((tuple(rows.shape), str(rows.dtype)), runtime.group, runtime.ranks)
    if len({(shape[1:], dtype, bool(shape)) for shape, dtype in told}) > 1 or not rows.dim():
        raise InputError(f"gather_rows: ranks have tensors of {', '.join(f'{list(s)} {d}' for s, d in told)}")
    longest = max(shape[0] for shape, _ in told)
    sent = rows.detach().to(torch.uint8) if rows.dtype is torch.bool else rows.detach()
    padded = sent.new_zeros(longest, *sent.shape[1:])
    padded[: len(sent)] = sent
    every = all_gather(padded, runtime.group).reshape(runtime.ranks, longest, *sent.shape[1:])
    return torch.cat([x[: shape[0]] for x, (shape, _) in zip(every, told, strict=True)]).to(rows.dtype)

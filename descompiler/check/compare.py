"""One rank's comparison of the distributed module with the original: outputs, gradients, weights, bytes."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from descompiler.builder import Builder
from descompiler.check.dynamic import optimizer_groups
from descompiler.check.judge import Judge, OriginalStep, Report, own_rows, without_copying_parameters
from descompiler.check.objective import Objective, batches, kind_of_loss
from descompiler.check.rounding import RoundingJudge
from descompiler.check.thorough import OWN_DTYPES, Trials, in_own_dtypes
from descompiler.compiler import distribute
from descompiler.errors import EquivalenceError
from descompiler.layout.rows import share_of
from descompiler.model.attributes import copied
from descompiler.model.float64 import InDouble, double_meant
from descompiler.model.inputs import by_path, flatten, map_tensors, split_statics, unflatten_with
from descompiler.model.probe import CALL, blueprint, call_of
from descompiler.module.distributed import DistributedModule
from descompiler.optim import FTRL
from descompiler.planning.assumed import BYTES
from descompiler.planning.objective import Terms
from descompiler.plugins import Kit
from descompiler.region.rule import Rule
from descompiler.tables.form import Form

ORIGINAL_FAILS = "nothing can be compared, the original itself can't run on"
"""What `verify` says of a model that raises on a batch that was made of the example's rows."""


OPTIMIZERS: dict[str, Any] = {  # eps as lr: the rounding of a gradient of zero enters the weight times lr / eps
    "sgd": lambda p: torch.optim.SGD(p, lr=0.002, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, eps=0.05),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, eps=0.01),
    "sparse_adam": lambda p: torch.optim.SparseAdam(p, lr=0.01, eps=0.01),
    "ftrl": lambda p: FTRL(p, lr=0.01, l1=0.01, l2=0.1),
}


def train_and_compare(
    rank: int,
    ranks: int,
    model: nn.Module,
    inputs: Any,
    steps: int,
    plans: list[Any],
    optimizers: list[str],
    device: str,
    method: str = CALL,
    rules: Sequence[Rule] = (),
    forms: Sequence[Form] = (),
    narrow: tuple[nn.Module, Any] | None = None,
    terms: Terms | None = None,
) -> Report:
    """``narrow``: the model and its inputs in its own dtypes, if the proof is to be thorough."""
    terms = terms or Terms()
    report = Report(ranks, wire_dtype=terms.wire_dtype)
    model, inputs = model.to(device), map_tensors(lambda x: x.to(device), inputs)
    kit = Kit.of(rules, forms)
    builder = functools.cache(lambda: Builder(blueprint(model), inputs, method, kit))  # one capture serves every case
    # of plans, those of the fewest bytes keep the most in the region, on however few rows
    compiled = functools.partial(distribute, process_group=None, batch=None, seed=None, terms=terms, cluster=BYTES)
    with double_meant():
        for plan in plans:
            for name in optimizers:
                module = compiled(model, builder, plan=plan, loss=kind_of_loss(inputs))
                title = f"plan {plan!r}, {name}, rank {rank}"
                _case(report, model, module, inputs, steps, title, name, rank, ranks, method)
            if narrow is not None:
                make = lambda loss, plan=plan: compiled(model, builder, plan=plan, loss=loss)  # noqa: E731
                Trials(report, model, make, f"plan {plan!r}, rank {rank}", rank, method).run(inputs)
    if narrow is not None:
        own, own_inputs = narrow[0].to(device), map_tensors(lambda x: x.to(device), narrow[1])
        own_builder = functools.cache(lambda: Builder(blueprint(own), own_inputs, method, kit))
        for plan in plans:
            module = compiled(own, own_builder, plan=plan, loss=kind_of_loss(inputs))
            title = f"plan {plan!r}, rank {rank}, trial {OWN_DTYPES!r}"
            judge = Judge(report, title, module, copy.deepcopy(own, copied(own)), rank)
            judge.check_start()
            in_own_dtypes(judge, model, own_inputs, method)
    return report


def _optimizer(name: str, module: nn.Module, sparse: set[str]) -> list[torch.optim.Optimizer]:
    if name == "sgd":
        return [OPTIMIZERS[name](optimizer_groups(module, {"momentum": 0}))]
    if name != "sparse_adam":
        return [OPTIMIZERS[name](module.parameters())]
    named = dict(module.named_parameters())
    rest = [p for n, p in named.items() if n not in sparse]
    chosen = [OPTIMIZERS[name]([p for n, p in named.items() if n in sparse])]
    return chosen + ([OPTIMIZERS["adagrad"](rest)] if rest else [])


def with_global_ids(local: Any, whole: Any, given: Sequence[int]) -> Any:
    """A rank's call; tensors of these positions are the global batch's.

    >>> with_global_ids(([torch.ones(1)], {}), ([torch.ones(3)], {}), given=[0])
    ([tensor([1., 1., 1.])], {})
    """
    if not given:
        return local
    leaves, spec = flatten(local)
    own, statics = split_statics(leaves)
    every, _ = split_statics(flatten(whole)[0])
    return unflatten_with([every[i] if i in given else x for i, x in enumerate(own)], spec, statics)


def even_shares(counts: list[int], inputs: Any, given: Sequence[int]) -> list[int]:
    """Rows of each rank: shares as even as can be where all inputs are the global batch's, and none says how many."""
    tensors, _ = split_statics(flatten(inputs)[0])
    if not given or len(given) < len(tensors):
        return counts
    return [share_of(sum(counts), rank, len(counts)) for rank in range(len(counts))]


def _case(
    report: Report,
    model: nn.Module,
    module: DistributedModule,
    inputs: Any,
    steps: int,
    title: str,
    optimizer: str,
    rank: int,
    ranks: int,
    method: str,
) -> None:
    drawn = any(note.startswith("random") for note in module.plan.notes)
    reference = copy.deepcopy(model, copied(model))
    of = report, title, module, reference, rank
    judge = Judge(*of) if report.wire_dtype is None else RoundingJudge(*of, wire_dtype=report.wire_dtype)
    judge.check_start()
    optimizers = [_optimizer(optimizer, net, module.plan.sparse) for net in (reference, module)]
    objective = Objective()
    for step in range(steps):
        inputs_now, counts = batches(inputs, step, ranks)
        counts = even_shares(counts, inputs_now, module.plan.layout.given)
        first = sum(counts[:rank])
        before = without_copying_parameters(reference)
        args, kwargs = own_rows(inputs_now, 0, sum(counts))
        given = by_path((args, kwargs))
        try:
            with module.next_draws() if drawn else nullcontext(), InDouble():
                expected = call_of(reference, method)(*args, **kwargs)
        except Exception as error:  # whatever the user's forward raises
            raise EquivalenceError(
                f"{title}: {ORIGINAL_FAILS} {sum(counts)} rows of example_inputs: {type(error).__name__}: {error}"
            ) from error
        local = own_rows(inputs_now, first, counts[rank])
        local_given = by_path(local)
        call = with_global_ids(local, (args, kwargs), module.plan.layout.given)
        got = module(*call[0], **call[1])
        layouts = module.output_rows
        for outputs, offset in ((expected, 0), (got, first)):
            if (loss := objective(outputs, layouts, offset)).requires_grad:  # a model may have nothing to train
                loss.backward()
        again = lambda outputs, _, layouts=layouts: objective(outputs, layouts)  # noqa: E731
        draws = module.latest_draws if drawn else nullcontext
        original = OriginalStep(before, inputs_now, sum(counts), again, method, draws)
        judge.prepare(original, expected)
        judge.outputs(got, expected, layouts, first, counts[rank])
        judge.arguments(local_given, local, given, (args, kwargs), first, counts[rank])
        judge.gradients(original)
        for o in (*optimizers[0], *optimizers[1]):
            o.step()
            o.zero_grad()
        predicted, sent = module.predicted_traffic(), module.traffic()
        if module.predicts_traffic and predicted != sent:
            judge.wrong(f"predicted traffic\n{predicted}\nis not what was sent\n{sent}")
        judge.settle()
    report.growth = max(report.growth, judge.weights() / max(judge.start, 1.0))
    judge.settle()
    report.cases += 1

"""The trials of a thorough proof on one rank: the module and the original in each, and what is compared."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from descompiler.check.judge import Judge, OriginalStep, Report, largest, on_any_rank, own_rows, wide
from descompiler.check.judge import without_copying_parameters as kept
from descompiler.check.objective import Objective, batches, kind_of_loss, output_tensors
from descompiler.check.trials import Trial, trials_of
from descompiler.errors import DescompilerError
from descompiler.model.attributes import copied
from descompiler.model.float64 import InDouble, widen
from descompiler.model.inputs import by_path, flatten, map_tensors
from descompiler.model.probe import call_of
from descompiler.module.distributed import DistributedModule
from descompiler.ops.local import plain

Make = Callable[[str], DistributedModule]
"""The compiled model for a kind of loss, as the model was; collective."""


NARROW_FACTOR = 16.0
"""Error that is allowed in a model's own dtypes: so many times what its rounding moves of the original's value."""


OWN_DTYPES = "the model's own dtypes"


class Trials:
    """What one rank tries of a model that was made for float64.

    Models go on from one trial to the next, with the state that it left; new ones begin after a refusal.
    """

    def __init__(self, report: Report, model: nn.Module, make: Make, title: str, rank: int, method: str):
        self.report, self.model, self.make = report, model, make
        self.title, self.rank, self.method = title, rank, method
        self._judges: dict[tuple[str, bool], Judge] = {}
        self._optimizers: list[torch.optim.Optimizer] = []

    def run(self, inputs: Any) -> None:
        """All of them, each on every rank. Collective.

        Raises
        ------
        EquivalenceError
            On every rank.
        """
        judge = self._judge(kind_of_loss(inputs), False)
        batch, counts = batches(inputs, 0, self.report.ranks)
        outputs = self._result(judge, batch, sum(counts))
        tensors = 0 if outputs is None else len(output_tensors(outputs))
        rows = [p.shape[0] for p in self.model.parameters() if p.dim() > 1 and p.device.type == "cpu"]  # no CUDA assert
        runs = lambda x: self._result(judge, x, sum(counts)) is not None  # noqa: E731
        for trial in trials_of(inputs, self.report.ranks, tensors, rows, runs):
            self._try(trial)

    def _judge(self, loss: str, optimised: bool) -> Judge:
        if (loss, optimised) not in self._judges:
            reference, module = copy.deepcopy(self.model, copied(self.model)), self.make(loss)
            judge = Judge(self.report, self.title, module, reference, self.rank)
            judge.check_start()
            self._judges[loss, optimised] = judge
            if optimised:
                self._optimizers = _adam(reference, module.plan.sparse) + _adam(module, module.plan.sparse)
        return self._judges[loss, optimised]

    def _result(self, judge: Judge, inputs: Any, rows: int) -> Any:
        """What a copy of the original returns, if that is finite."""
        args, kwargs = own_rows(inputs, 0, rows)
        net = copy.deepcopy(judge.reference, copied(judge.reference))
        try:
            with _draws(judge), InDouble():
                outputs = call_of(net, self.method)(*args, **kwargs)
        except Exception:  # whatever the user's forward raises: there is nothing to compare
            return None
        return outputs if all(bool(x.isfinite().all()) for x in output_tensors(outputs)) else None

    def _try(self, trial: Trial) -> None:
        lasting = trial.optimised or trial.evaluated
        judge = self._judge(trial.loss, lasting)
        judge.title = f"{self.title}, trial {trial.name!r}"
        self.report.tried.add(trial.name)
        refused: str | None = None
        with _evaluated(judge) if trial.evaluated else nullcontext():
            if self._result(judge, trial.inputs, sum(trial.counts)) is None:
                self.report.left_out.add(trial.name)
                return
            try:
                self._step(judge, trial)
            except DescompilerError as error:
                refused = str(error).splitlines()[0]
            except Exception as error:  # whatever it is, the original did not raise it
                judge.wrong(f"{type(error).__name__}: {error}, and the original has a result")
        if on_any_rank(refused is not None):
            self.report.refused |= {} if refused is None else {trial.name: refused}
            del self._judges[trial.loss, lasting]  # its step was not finished
        judge.settle()

    def _step(self, judge: Judge, trial: Trial) -> None:
        module, reference, rank = judge.module, judge.reference, self.rank
        total, first, count = sum(trial.counts), sum(trial.counts[:rank]), trial.counts[rank]
        before = kept(reference)
        local, whole = own_rows(trial.inputs, first, count), own_rows(trial.inputs, 0, total)
        local_given, given = by_path(local), by_path(whole)
        for net in (reference, module):
            net.zero_grad()
        with _draws(judge), InDouble():
            expected = call_of(reference, self.method)(*whole[0], **whole[1])
        got = module(*local[0], **local[1])
        layouts = module.output_rows
        judge.outputs(got, expected, layouts, first, count)
        judge.arguments(local_given, local, given, whole, first, count)
        if not trial.evaluated:

            def objective(outputs: Any, inputs: Any) -> Tensor:
                return trial.objective(outputs, layouts, 0, trial.weights(None), _tensors(inputs))

            if (loss := objective(expected, whole)).requires_grad:
                loss.backward()
            loss = trial.objective(got, layouts, first, trial.weights(rank), _tensors(local))
            if loss.requires_grad:
                loss.backward()
            latest = lambda: _draws(judge, latest=True)  # noqa: E731
            again = OriginalStep(before, trial.inputs, total, objective, self.method, latest)
            if all(p.grad is None or bool(plain(p.grad).to_dense().isfinite().all()) for p in reference.parameters()):
                judge.gradients(again, strict=True)
            else:
                self.report.left_out.add(trial.name)  # of the outputs alone it was a trial
        if trial.optimised:
            for o in self._optimizers:
                o.step()
        judge.weights()


def _draws(judge: Judge, *, latest: bool = False) -> AbstractContextManager[None]:
    module = judge.module
    if not any(note.startswith("random") for note in module.plan.notes):
        return nullcontext()
    return module.latest_draws() if latest else module.next_draws()


def in_own_dtypes(judge: Judge, exact: nn.Module, inputs: Any, method: str) -> None:
    """A step of a model in its own dtypes, which is to be as near to float64's as the original's own. Collective.

    ``exact``: the original made for float64.

    Raises
    ------
    EquivalenceError
        On every rank.
    """
    report, module, reference, rank = judge.report, judge.module, judge.reference, judge.rank
    report.tried.add(OWN_DTYPES)
    batch, counts = batches(inputs, 0, report.ranks)
    total, first = sum(counts), sum(counts[:rank])
    (args, kwargs), exact = own_rows(batch, 0, total), copy.deepcopy(exact, copied(exact))
    try:
        with _draws(judge):
            expected = call_of(reference, method)(*args, **kwargs)
    except Exception:  # there is no kernel for the dtypes on this device
        report.left_out.add(OWN_DTYPES)
        return
    args, kwargs = own_rows(map_tensors(widen, batch), 0, total)
    with _draws(judge), InDouble():
        precise = call_of(exact, method)(*args, **kwargs)
    args, kwargs = own_rows(batch, first, counts[rank])
    try:
        got = module(*args, **kwargs)
        layouts = module.output_rows
        for outputs, offset in ((expected, 0), (precise, 0), (got, first)):
            if (loss := Objective()(outputs, layouts, offset)).requires_grad:
                loss.backward()
    except DescompilerError as error:
        report.refused[OWN_DTYPES] = str(error).splitlines()[0]
    if on_any_rank(OWN_DTYPES in report.refused):
        return
    outputs = [output_tensors(x) for x in (got, expected, precise)]
    for i, (a, b, c, layout) in enumerate(zip(*outputs, layouts, strict=True)):
        part = b if layout is None else layout.narrow(b, first, counts[rank])
        _as_near(judge, f"output {i}", a, part, b, c)
    true = {n: p.grad for n, p in exact.named_parameters()}
    for name, p in module.named_parameters():
        whole, precisely = reference.get_parameter(name).grad, true[name]
        if p.grad is not None and whole is not None and precisely is not None:
            part = module.plan.pieces[name].cut(whole.to_dense(), rank)
            _as_near(
                judge, f"gradient {name!r}", plain(p.grad).to_dense(), part, whole.to_dense(), precisely.to_dense()
            )
    judge.settle()


def _as_near(judge: Judge, what: str, a: Tensor, part: Tensor, whole: Tensor, precise: Tensor) -> None:
    """``part`` of the original's ``whole``, and ``precise``: the whole in float64."""
    if a.dtype != part.dtype:
        judge.wrong(f"{what} is {a.dtype}, the original's {part.dtype}")
    if not (part.is_floating_point() or part.is_complex()) or not bool(precise.isfinite().all()):
        return
    rounding = largest([whole.detach().to(wide(whole)) - precise.detach()])
    allowed = NARROW_FACTOR * (rounding + torch.finfo(part.dtype).eps * largest([precise]))
    difference = largest([a.detach().to(wide(a)) - part.detach().to(wide(part))])
    if not difference <= allowed:
        judge.wrong(f"{what} differs by {difference:.1e} (allowed {allowed:.1e})")


def _tensors(inputs: Any) -> list[Tensor]:
    return [x for x in flatten(inputs)[0] if isinstance(x, Tensor)]


def _adam(net: nn.Module, sparse: set[str]) -> list[torch.optim.Optimizer]:
    """Adam with weight decay, of the tables with sparse gradients SparseAdam; rounding stays small, as `OPTIMIZERS`."""
    rest = [p for n, p in net.named_parameters() if n not in sparse]
    tables = [p for n, p in net.named_parameters() if n in sparse]
    found: list[torch.optim.Optimizer] = [torch.optim.Adam(rest, lr=0.01, eps=0.01, weight_decay=0.1)] if rest else []
    return found + ([torch.optim.SparseAdam(tables, lr=0.01, eps=0.01)] if tables else [])


@contextmanager
def _evaluated(judge: Judge) -> Iterator[None]:
    """Both in evaluation, without gradients; training flags are as before afterwards."""
    nets = judge.module, judge.reference
    flags = [(m, m.training) for net in nets for m in net.modules()]
    for net in nets:
        net.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for m, training in flags:
            m.training = training

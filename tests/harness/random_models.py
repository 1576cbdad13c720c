"""Random recommender models, as the text of a short script: fields, shared tables, bags, histories, and consumers.

A model is text, so that one that fails can be printed and run. Consumers are drawn from what the rules keep in the
region, from operators that have no rule, and from what rows have in common: branches, state, sets and draws.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from tests.harness.consumers import CONSUMERS, EVERY, HELPERS, HISTORY, PADDED, UNUSUAL, of_history
from tests.harness.training import Training

ROWS = 6
"""Rows of the example batch."""

PADDED_HISTORY = (
    f"torch.randint(1, 9, ({ROWS}, 4), generator=g) * (torch.arange(4) < torch.randint(1, 5, ({ROWS}, 1), generator=g))"
)
"""Of one item at least."""

TRAININGS: list[Training | None] = [
    *[None] * 5,
    Training("rank_mean"),
    Training("row_mean"),
    Training("sum", ignores=True),
    Training("rank_mean", ignores=True),
    Training("sum", penalty=True),
    Training("rank_mean", penalty=True),
    Training("sum", pads=True),
    Training("row_mean", pads=True),
]
"""None: as `des.verify` does."""

NOT_PADDED, UNUSUAL_NOT_PADDED = ([c for c in sorted(known) if not of_history(c)] for known in (CONSUMERS, UNUSUAL))


@dataclass(frozen=True)
class Case:
    """A model and how to verify it.

    Attributes
    ----------
    text : str
        Defines ``Model`` and ``inputs()``.
    training : Training or None
        None: as `des.verify` does, with the optimiser.
    """

    text: str
    ranks: int
    plan: dict[str, str] | None
    optimizer: str
    consumers: tuple[str, ...]
    training: Training | None = None

    def script(self) -> str:
        """A script that fails as the case does."""
        call = (
            f"des.verify(Model(), inputs(), ranks={self.ranks}, plans=[{self.plan!r}], optimizers=[{self.optimizer!r}])"
        )
        if self.training is None:
            return f"{self.text}\nif __name__ == '__main__':\n    print({call})\n"
        return f"""{self.text}
if __name__ == "__main__":
    from descompiler.check.processes import on_ranks
    from tests.harness.training import Training, outcome  # run it in the root of the repository

    case = open(__file__).read(), {self.plan!r}, {self.optimizer!r}, {self.training!r}
    print(on_ranks(outcome, {self.ranks}, *case))
"""


def fixed(consumer: str) -> Case:
    """The consumer on two tables, one looked up twice, and dense features."""
    lines = _lines(
        ["self.t0 = nn.Embedding(7, 4)", "self.t1 = nn.Embedding(5, 4)"],
        ["self.t0(a)", "self.t1(b)", "self.t0(c)"],
        [
            ("a", f"torch.randint(7, ({ROWS},), generator=g)"),
            ("b", f"torch.randint(5, ({ROWS},), generator=g)"),
            ("c", f"torch.randint(7, ({ROWS},), generator=g)"),
        ],
        [consumer],
        (3, 4),
        "torch.sigmoid",
        "sum",
    )
    return Case(lines, 2, None, "sgd", (consumer,))


def drawn(seed: int, forms: tuple[str, ...]) -> Case:
    """The random model of a seed, with forms chosen by the compiler or drawn for each table."""
    draw = random.Random(seed)
    dim = draw.choice([2, 3, 4, 6])
    sizes = [draw.randint(3, 12) for _ in range(draw.randint(1, 3))]
    sparse = draw.random() < 0.25
    init, parts, inputs, plan = [], [], [], {}
    joint = draw.randint(0, 4) == 0
    if joint:  # one table for all fields, with offsets
        count = draw.randint(2, 4)
        rows = [draw.randint(2, 9) for _ in range(count)]
        starts = [sum(rows[:i]) for i in range(count)]
        init.append(f"self.joint = nn.Embedding({sum(rows)}, {dim}, sparse={sparse})")
        init.append(f"self.register_buffer('starts', torch.tensor({starts}))")
        parts.append("*self.joint(ids_j + self.starts).unbind(1)")
        columns = ", ".join(f"torch.randint({n}, ({ROWS},), generator=g)" for n in rows)
        inputs.append(("ids_j", f"torch.stack([{columns}], 1)"))
        plan["joint.weight"] = draw.choice(forms)
        fields = count
    else:
        fields = 0
    for t, n in enumerate(sizes):
        kind = draw.choice(["table", "table", "table", "bag", "bag", "weighted bag"])
        padding = draw.choice([None, None, 0])
        learned = kind == "weighted bag" and draw.random() < 0.5
        if kind == "table":
            init.append(f"self.t{t} = nn.Embedding({n}, {dim}, sparse={sparse}, padding_idx={padding})")
        else:
            mode = "sum" if kind == "weighted bag" else draw.choice(["sum", "mean"])
            init.append(
                f"self.t{t} = nn.EmbeddingBag({n}, {dim}, mode={mode!r}, sparse={sparse}, padding_idx={padding})"
            )
        if learned:
            init.append(f"self.w{t} = nn.Embedding({n}, 1, sparse={sparse})")
            plan[f"w{t}.weight"] = draw.choice(forms)
        plan[f"t{t}.weight"] = draw.choice(forms)
        for use in range(draw.randint(1, 2)):
            name = f"ids_{t}_{use}"
            if kind == "bag":
                length = draw.randint(1, 3)
                parts.append(f"self.t{t}({name})")
            elif kind == "weighted bag":
                length = draw.randint(1, 3)
                weights = f"self.w{t}({name}).squeeze(-1).sigmoid()" if learned else f"weights_{t}_{use}"
                parts.append(f"self.t{t}({name}, per_sample_weights={weights})")
                if not learned:
                    inputs.append((weights, f"torch.rand({ROWS}, {length}, generator=g)"))
            else:
                how = draw.choice(["one", "one", "sum", "mean", "largest", "masked mean", "masked product"])
                length = 0 if how == "one" else draw.randint(2, 3)
                parts.append(
                    {
                        "one": f"self.t{t}({name})",
                        "sum": f"self.t{t}({name}).sum(1)",
                        "mean": f"self.t{t}({name}).mean(1)",
                        "largest": f"self.t{t}({name}).amax(1)",
                        "masked mean": f"masked_mean(self.t{t}({name}), {name} != 0)",
                        "masked product": f"torch.bmm(({name} != 0).to(x).unsqueeze(1), self.t{t}({name})).squeeze(1)",
                    }[how]
                )
            shape = f"({ROWS}, {length})" if length else f"({ROWS},)"
            inputs.append((name, f"torch.randint({n}, {shape}, generator=g)"))
            fields += 1
    training = draw.choice(TRAININGS)
    way = training or Training()
    names = draw.sample(NOT_PADDED if way.pads else sorted(CONSUMERS), draw.randint(1, 3))
    if draw.random() < 0.5:
        names.append(draw.choice(UNUSUAL_NOT_PADDED if way.pads else sorted(UNUSUAL)))
    if way.pads:
        names.append(draw.choice(PADDED))
    if way.penalty:
        names.append("dense features times a field")
    names = list(dict.fromkeys(names))
    outputs = "dict" if way.ignores else draw.choice(["sum", "tuple", "dict"])
    activation = draw.choice(["", "torch.sigmoid", "torch.tanh"])
    if any(map(of_history, names)):
        plan["items.weight"] = draw.choice(forms)
    text = _lines(init, parts, inputs, names, (fields, dim), activation, outputs, sparse, way.pads)
    chosen = None if draw.randint(0, 3) == 0 else plan
    optimizer = draw.choice(["sgd", "adagrad", "adam"]) if not sparse else "sparse_adam"
    return Case(text, draw.choice([2, 2, 3]), chosen, optimizer, tuple(names), training)


def _lines(
    init: list[str],
    parts: list[str],
    inputs: list[tuple[str, str]],
    names: list[str],
    sizes: tuple[int, int],
    activation: str,
    outputs: str,
    sparse: bool = False,
    pads: bool = False,
) -> str:
    """The text of a model.

    Parameters
    ----------
    init, parts, inputs, names
        Modules, fields' vectors, inputs, consumers.
    sizes
        F and D.
    activation
        What each term goes through.
    outputs
        Terms as a "sum", a "tuple", or a "dict" with a number beside them.
    pads
        Whether histories end with padding.
    """
    terms: list[str] = []
    body = [f"v = torch.stack([{', '.join(parts)}], 1)", "e, u = v.flatten(1), v[:, 0]"]
    if any(map(of_history, names)):
        body += HISTORY
        # in sparse gradients padding that is looked up is a row: inert is what has no gradient
        padding = ", padding_idx=0" if sparse and pads else ""
        init = [*init, f"self.items = nn.Embedding(9, {sizes[1]}, sparse={sparse}{padding})"]
        inputs = [
            *inputs,
            ("history", PADDED_HISTORY if pads else f"torch.randint(9, ({ROWS}, 4), generator=g)"),
            ("target", f"torch.randint(9, ({ROWS},), generator=g)"),
        ]
    if all(map(of_history, names)):
        names = [*names, "sum of fields"]  # a model uses all its tables
    for i, name in enumerate(names):
        module, expression = (s.format(n=f"c{i}", F=sizes[0], D=sizes[1]) for s in EVERY[name])
        init = [*init, module] if module else init
        terms.append(f"({expression}).sum(1)  # {name}")
    body += [f"y{i} = {t}" for i, t in enumerate(terms)]
    total = [f"{activation}(y{i})" for i in range(len(terms))]
    returned = {
        "sum": " + ".join(total),
        "tuple": ", ".join(total),
        "dict": "{" + ", ".join(f"'y{i}': {t}" for i, t in enumerate(total)) + ", 'size': e.square().mean()}",
    }
    body.append(f"return {returned[outputs]}")
    called = "\n".join([*init, *body])
    arguments = ", ".join(n for n, _ in inputs)
    lines = [
        "import torch",
        "import torch.nn.functional as F",
        "from torch import nn",
        "",
        "import descompiler as des",
        "",
        "",
        *(f"{helper.strip()}\n\n" for name, helper in HELPERS.items() if re.search(rf"\b{name}\(", called)),
        "class Model(nn.Module):",
        "    def __init__(self):",
        "        super().__init__()",
        "        torch.manual_seed(0)",
        *(f"        {x}" for x in init),
        "",
        f"    def forward(self, x, {arguments}):",
        *(f"        {x}" for x in body),
        "",
        "",
        "def inputs():",
        "    g = torch.Generator().manual_seed(0)",
        "    return (",
        f"        torch.randn({ROWS}, 3, generator=g),",
        *(f"        {x}," for _, x in inputs),
        "    )",
        "",
    ]
    return "\n".join(lines)

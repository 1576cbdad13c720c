"""Random recommender models, as the text of a short script: fields, shared tables, bags, histories, and consumers.

A model is text, so that one that fails can be printed and run. Consumers are drawn from what the rules keep in the
region and from operators that have no rule.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

ROWS = 6
"""Rows of the example batch."""

# Of the fields' vectors v [b, F, D], e = v.flatten(1) [b, F*D], u = v[:, 0] [b, D], dense x [b, 3]: a term [b, k].
# `{n}` is the consumer's own name for its modules; {F}, {D} are sizes.
CONSUMERS: dict[str, tuple[str, str]] = {
    "sum of fields": ("", "v.sum(1)"),
    "mean of fields": ("", "v.mean(1) * 3"),
    "largest field": ("", "v.amax(1)"),
    "factorisation machine": ("", "0.5 * (v.sum(1) ** 2 - (v**2).sum(1)).sum(1, keepdim=True)"),
    "tower": (
        "self.{n} = nn.Sequential(nn.Linear({F} * {D}, 5), nn.ReLU(), nn.Linear(5, 2))",
        "self.{n}(e)",
    ),
    "tower with dense features": (
        "self.{n} = nn.Linear({F} * {D} + 3, 4)",
        "torch.tanh(self.{n}(torch.cat([e, x], 1)))",
    ),
    "dense features in the middle": (
        "self.{n} = nn.Linear({F} * {D} + 3, 3)",
        "self.{n}(torch.cat([e[:, :{D}], x, e[:, {D}:]], 1))",
    ),
    "batch norm": (
        "self.{n} = nn.Sequential(nn.Linear({F} * {D}, 4), nn.BatchNorm1d(4), nn.Sigmoid(), nn.Linear(4, 1))",
        "self.{n}(e)",
    ),
    "batch norm in front": ("self.{n} = nn.BatchNorm1d({F} * {D})", "self.{n}(e).sum(1, keepdim=True)"),
    "batch norm of fields": ("self.{n} = nn.BatchNorm1d({F})", "self.{n}(v).tanh().sum(1)"),
    "batch norm of a field": (
        "self.{n} = nn.BatchNorm1d({D}, affine=False); self.{n}b = nn.BatchNorm1d({D}, track_running_stats=False)",
        "self.{n}(u) + self.{n}b(v[:, -1].square()).tanh()",
    ),
    "batch norm, then narrow": (
        "self.{n} = nn.Sequential(nn.BatchNorm1d({F} * {D}), nn.Linear({F} * {D}, 2))",
        "self.{n}(e * e)",
    ),
    "layer norm": ("self.{n} = nn.LayerNorm({D})", "self.{n}(v).tanh().sum(1)"),
    "linear of each field": ("self.{n} = nn.Linear({D}, 3)", "torch.relu(self.{n}(v)).sum(1)"),
    "linear of the sum": ("self.{n} = nn.Linear({D}, 3, bias=False)", "self.{n}(v.sum(1))"),
    "inner products": ("", "torch.bmm(v, v.transpose(1, 2)).flatten(1)"),
    "dot product": ("", "(u * v[:, -1]).sum(1, keepdim=True)"),
    "cosine": ("", "torch.cosine_similarity(u, (v[:, -1] - 0.3).tanh(), dim=1).unsqueeze(1)"),
    "normalised": ("", "F.normalize(v, dim=-1).sum(1)"),
    "cross layer": ("self.{n} = nn.Linear({F} * {D}, {F} * {D})", "(e * self.{n}(e) + e).sum(1, keepdim=True)"),
    "attention over fields": ("", "(torch.softmax(torch.matmul(v, v.transpose(1, 2)), -1) @ v).sum(1)"),
    "attention with heads": (
        "self.{n} = nn.Linear({D}, {D}), nn.Linear({D}, {D}); self.{n}a, self.{n}b = self.{n}",
        "(torch.softmax(self.{n}a(v) @ self.{n}b(v).transpose(1, 2), -1) @ v).mean(1)",
    ),
    "target attention": ("", "(torch.softmax((v * u.unsqueeze(1)).sum(-1), 1).unsqueeze(-1) * v).sum(1)"),
    "pooled softmax": ("", "(torch.softmax(v, 1) * v).sum(1)"),
    "gate": (
        "self.{n} = nn.Linear({F} * {D}, 2); self.{n}e = nn.ModuleList(nn.Linear({F} * {D}, 3) for _ in range(2))",
        "(torch.softmax(self.{n}(e), 1).unsqueeze(-1) * torch.stack([f(e) for f in self.{n}e], 1)).sum(1)",
    ),
    "compressed interaction": (
        "self.{n} = nn.Conv1d({F} * {F}, 3, 1)",
        "torch.relu(self.{n}((v.unsqueeze(2) * v.unsqueeze(1)).flatten(1, 2))).sum(-1)",
    ),
    "einsum of pairs": ("", "torch.einsum('bfd,bgd->bfg', v, v).flatten(1)"),
    "einsum with a weight": (
        "self.{n} = nn.Parameter(torch.randn({F}, {D}, 3))",
        "torch.einsum('bfd,fdk->bk', v, self.{n})",
    ),
    "bilinear": ("self.{n} = nn.Parameter(torch.randn({D}, {D}))", "((u @ self.{n}) * v[:, -1]).sum(1, keepdim=True)"),
    "weight of each field": ("self.{n} = nn.Parameter(torch.randn({F}, 1))", "(v * self.{n}).sum(1)"),
    "bias of each element": ("self.{n} = nn.Parameter(torch.randn({F}, {D}))", "torch.sigmoid(v + self.{n}).sum(1)"),
    "parametric relu": ("self.{n} = nn.PReLU()", "self.{n}(v).sum(1)"),
    "pairs by index": (
        "",
        "(v[:, [i for i in range({F}) for _ in range({F})]] * v[:, list(range({F})) * {F}]).sum(-1)",
    ),
    "triangle of products": (
        "",
        "torch.bmm(v, v.transpose(1, 2))[:, [i for i in range({F}) for _ in range(i + 1)], "
        "[j for i in range({F}) for j in range(i + 1)]].tanh()",
    ),
    "split and joined": ("", "torch.cat(torch.chunk(v, 2, -1)[::-1], -1).sum(1)"),
    "unbound": ("", "torch.stack(torch.unbind(v, 1)[::-1], 1)[:, 0]"),
    "broadcast": ("", "(u.unsqueeze(1).expand(-1, {F}, -1) - v).abs().sum(1)"),
    "repeated": ("", "v.repeat(1, 2, 1).square().mean(1)"),
    "scales in front": ("self.{n} = nn.Parameter(torch.randn(3, 1, 1))", "(u * self.{n}).tanh().sum(0)"),
    "scales of equal size": ("self.{n} = nn.Parameter(torch.randn(2, 1, {F}, 1))", "(v * self.{n}).tanh().sum((0, 2))"),
    "chosen by a score": (
        "self.{n} = nn.Linear({D}, 1)",
        "v.gather(1, self.{n}(v).topk(1, 1)[1].expand(-1, -1, {D})).flatten(1)",
    ),
    "rows and fields as one": ("", "v.reshape(-1, {D}).tanh().view(v.shape[0], -1, {D}).sum(1)"),
    "where": ("", "torch.where(v > 0, v, 0.1 * v.square()).sum(1)"),
    "clamped": ("", "v.clamp(-0.2, 0.2).sum(1)"),
    "logarithm": ("", "torch.log1p(v.abs()).sum(1)"),
    "ratio": ("", "v.sum(1) / (1 + v.square().sum(1))"),
    "scaled difference": ("", "2 * v[:, 0] - v[:, -1] / 3 + 1"),
    "dense features times a field": ("self.{n} = nn.Linear(3, {D})", "self.{n}(x) * u"),
    "recurrent": ("self.{n} = nn.GRU({D}, 3, batch_first=True)", "self.{n}(v)[0].sum(1)"),
    "sorted": ("", "v.sort(-1).values.sum(1)"),
    "cumulative": ("", "v.cumsum(1).tanh().sum(1)"),
    "turned, and multiplied": ("", "(v.flip(1).cumprod(1).tanh() + v.var(1, keepdim=True, correction=0)).prod(1)"),
    # of a history h [b, 4, D] of items, its mask m [b, 4] (ids that are not 0), and a target t [b, D]: one table
    "recurrent history": ("self.{n} = nn.GRU({D}, 3, batch_first=True)", "self.{n}(h)[1].squeeze(0)"),
    "recurrent history, all states": (
        "self.{n} = nn.LSTM({D}, 2, num_layers=2, bidirectional=True, batch_first=True)",
        "(self.{n}(h)[0] * m.unsqueeze(-1)).sum(1)",
    ),
    "encoded history": (
        "self.{n} = nn.TransformerEncoderLayer({D}, 1, 5, dropout=0.0, batch_first=True)",
        "self.{n}(h, src_key_padding_mask=~m & (m.sum(1, keepdim=True) > 0))[:, -1]",
    ),
    "masked attention": (
        "self.{n} = nn.Linear({D}, {D})",
        "(torch.softmax((self.{n}(h) * t.unsqueeze(1)).sum(-1).masked_fill(~m, -1e9), 1).unsqueeze(-1) * h).sum(1)",
    ),
    "activation unit": (
        "self.{n} = nn.Sequential(nn.Linear(4 * {D}, 3), nn.PReLU(), nn.Linear(3, 1))",
        "(self.{n}(torch.cat([t.unsqueeze(1).expand_as(h), h, t.unsqueeze(1) - h, h * h], -1)) * h).sum(1)",
    ),
    "masked mean of a history": ("", "(h * m.unsqueeze(-1)).sum(1) / (m.sum(1, keepdim=True) + 1)"),
    "masked elements": ("", "torch.where(m.unsqueeze(-1), h, h.square()).tanh().sum(1)"),
    "largest of a history": ("", "h.masked_fill(~m.unsqueeze(-1), -2).max(1).values"),
    "gated history": (
        "self.{n} = nn.Linear({D}, {D}); self.{n}n = nn.LayerNorm({D})",
        "self.{n}n(torch.sigmoid(self.{n}(h)) * h).mean(1) + t",
    ),
    "cosine of a history": ("", "F.cosine_similarity(h.mean(1), t, dim=-1).unsqueeze(1)"),
    "positions of a history": (
        "self.{n} = nn.Embedding(4, {D})",
        "torch.tanh(h + self.{n}(torch.arange(4).repeat(h.shape[0], 1))).sum(1)",
    ),
    "positions' weights of a history": (
        "self.{n} = nn.Parameter(torch.randn(4, 1))",
        "torch.tanh(h * (self.{n} * torch.ones(h.shape[0], 1, 1).to(h))).sum(1)",
    ),
    "last of a history": ("", "h.gather(1, (m.sum(1).clamp(min=1) - 1).view(-1, 1, 1).expand(-1, 1, {D})).squeeze(1)"),
    "scalar weight": ("self.{n} = nn.Parameter(torch.tensor(0.3))", "h[:, 0] * self.{n}"),
    "shared weight": ("self.{n} = nn.Linear({D}, 3)", "self.{n}(u) + self.{n}(v[:, -1])"),
    "computed weight": ("self.{n} = nn.Parameter(torch.randn(3, {D}))", "F.linear(u, F.normalize(self.{n}, dim=1))"),
}

HISTORY = ["h, t = self.items(history), self.items(target)", "m = history != 0"]
"""What consumers of a history start with."""


def _of_history(consumer: str) -> bool:
    return re.search(r"\b[hmt]\b", CONSUMERS[consumer][1].replace("'", "")) is not None


@dataclass(frozen=True)
class Case:
    """A model and how to verify it.

    Attributes
    ----------
    text : str
        Defines ``Model`` and ``inputs()``.
    """

    text: str
    ranks: int
    plan: dict[str, str] | None
    optimizer: str
    consumers: tuple[str, ...]

    def script(self) -> str:
        """A script that fails as the case does."""
        call = (
            f"des.verify(Model(), inputs(), ranks={self.ranks}, plans=[{self.plan!r}], optimizers=[{self.optimizer!r}])"
        )
        return f"{self.text}\nif __name__ == '__main__':\n    print({call})\n"


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
        False,
    )
    return Case(lines, 2, None, "sgd", (consumer,))


@st.composite
def cases(draw: Any, forms: tuple[str, ...]) -> Case:
    """A random model, with forms chosen by the compiler or drawn for each table."""
    dim = draw(st.sampled_from([2, 3, 4, 6]))
    sizes = draw(st.lists(st.integers(3, 12), min_size=1, max_size=3))
    sparse = draw(st.booleans()) and draw(st.booleans())
    init, parts, inputs, plan = [], [], [], {}
    joint = draw(st.integers(0, 4)) == 0
    if joint:  # one table for all fields, with offsets
        count = draw(st.integers(2, 4))
        rows = draw(st.lists(st.integers(2, 9), min_size=count, max_size=count))
        starts = [sum(rows[:i]) for i in range(count)]
        init.append(f"self.joint = nn.Embedding({sum(rows)}, {dim}, sparse={sparse})")
        init.append(f"self.register_buffer('starts', torch.tensor({starts}))")
        parts.append("*self.joint(ids_j + self.starts).unbind(1)")
        columns = ", ".join(f"torch.randint({n}, ({ROWS},), generator=g)" for n in rows)
        inputs.append(("ids_j", f"torch.stack([{columns}], 1)"))
        plan["joint.weight"] = draw(st.sampled_from(forms))
        fields = count
    else:
        fields = 0
    for t, n in enumerate(sizes):
        kind = draw(st.sampled_from(["table", "table", "bag"]))
        padding = draw(st.sampled_from([None, None, 0]))
        if kind == "bag":
            mode = draw(st.sampled_from(["sum", "mean"]))
            init.append(
                f"self.t{t} = nn.EmbeddingBag({n}, {dim}, mode={mode!r}, sparse={sparse}, padding_idx={padding})"
            )
        else:
            init.append(f"self.t{t} = nn.Embedding({n}, {dim}, sparse={sparse}, padding_idx={padding})")
        plan[f"t{t}.weight"] = draw(st.sampled_from(forms))
        for use in range(draw(st.integers(1, 2))):
            name = f"ids_{t}_{use}"
            if kind == "bag":
                length = draw(st.integers(1, 3))
                parts.append(f"self.t{t}({name})")
            else:
                how = draw(st.sampled_from(["one", "one", "sum", "mean", "largest", "masked mean", "masked product"]))
                length = 0 if how == "one" else draw(st.integers(2, 3))
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
    names = draw(st.lists(st.sampled_from(sorted(CONSUMERS)), min_size=1, max_size=3, unique=True))
    several = draw(st.booleans())
    activation = draw(st.sampled_from(["", "torch.sigmoid", "torch.tanh"]))
    if any(map(_of_history, names)):
        plan["items.weight"] = draw(st.sampled_from(forms))
    text = _lines(init, parts, inputs, names, (fields, dim), activation, several, sparse)
    chosen = None if draw(st.integers(0, 3)) == 0 else plan
    optimizer = draw(st.sampled_from(["sgd", "adagrad", "adam"])) if not sparse else "sparse_adam"
    return Case(text, draw(st.sampled_from([2, 2, 3])), chosen, optimizer, tuple(names))


def _lines(
    init: list[str],
    parts: list[str],
    inputs: list[tuple[str, str]],
    names: list[str],
    sizes: tuple[int, int],
    activation: str,
    several: bool,
    sparse: bool = False,
) -> str:
    """The text of a model: modules, fields' vectors, inputs, consumers, (F, D), what each term goes through."""
    terms: list[str] = []
    body = [f"v = torch.stack([{', '.join(parts)}], 1)", "e, u = v.flatten(1), v[:, 0]"]
    if any(map(_of_history, names)):
        body += HISTORY
        init = [*init, f"self.items = nn.Embedding(9, {sizes[1]}, sparse={sparse})"]
        inputs = [
            *inputs,
            ("history", f"torch.randint(9, ({ROWS}, 4), generator=g)"),
            ("target", f"torch.randint(9, ({ROWS},), generator=g)"),
        ]
    if all(map(_of_history, names)):
        names = [*names, "sum of fields"]  # a model uses all its tables
    for i, name in enumerate(names):
        module, expression = (s.format(n=f"c{i}", F=sizes[0], D=sizes[1]) for s in CONSUMERS[name])
        init = [*init, module] if module else init
        terms.append(f"({expression}).sum(1)  # {name}")
    body += [f"y{i} = {t}" for i, t in enumerate(terms)]
    total = [f"{activation}(y{i})" for i in range(len(terms))]
    body.append(f"return {', '.join(total)}" if several else f"return {' + '.join(total)}")
    arguments = ", ".join(n for n, _ in inputs)
    lines = [
        "import torch",
        "import torch.nn.functional as F",
        "from torch import nn",
        "",
        "import descompiler as des",
        "",
        "",
        "def masked_mean(v, mask):",
        "    mask = mask.unsqueeze(-1).to(v.dtype)",
        "    return (v * mask).sum(1) / mask.sum(1).clamp(min=1)",
        "",
        "",
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

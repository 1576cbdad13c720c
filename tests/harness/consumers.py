"""What random models are made of: text of terms that are computed from looked-up vectors, and of their modules."""

from __future__ import annotations

import re

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

UNUSUAL: dict[str, tuple[str, str]] = {
    # branches, on sizes and on values
    "branch on the batch's size": ("", "(v.sum(1) if x.shape[0] > 8 else v.mean(1))"),
    "branch on the batch's values": ("", "(u.tanh() if x.sum() > 0 else u.sigmoid())"),
    "branch on values in a module": ("self.{n} = Branch()", "self.{n}(u)"),
    "branch on each row's values": ("self.{n} = RowBranch()", "self.{n}(u)"),
    # state that forward assigns
    "minus a running mean": ("self.{n} = Centred({D})", "self.{n}(u).tanh()"),
    "count of steps": ("self.{n} = Counted()", "self.{n}(v.sum(1))"),
    # complex values
    "turned in the complex plane": (
        "",
        "(torch.view_as_complex(torch.stack([u, v[:, -1]], -1)) * torch.polar(torch.ones_like(u), v.sum(1)) - 2).abs()",
    ),
    "complex inner product": ("", "(torch.complex(u, v[:, -1]) * torch.complex(v.sum(1), u).conj()).real"),
    # all rows together
    "minus the batch's mean": ("", "(u - u.mean(0)).tanh()"),
    "softmax over the batch": ("", "torch.softmax(u, 0) * u"),
    "logits in the batch": ("", "(u @ v[:, -1].T).logsumexp(1, keepdim=True)"),
    # sets over the batch
    "found in the batch": ("", "t * torch.isin(target, history).to(t).unsqueeze(1)"),
    "rank in the batch": ("", "u * torch.searchsorted(x[:, 0].sort().values, x[:, 0].contiguous()).unsqueeze(1) / 8"),
    "distinct in the batch": ("", "t * (torch.unique(target).shape[0] / 8)"),
    # draws for the whole batch
    "noise of all rows": ("", "u * torch.randn({D}).to(u)"),
    "drawn rows of the batch": ("", "(u @ u[torch.randint(u.shape[0], (3,))].T).tanh()"),
    "permuted rows of the batch": ("", "u * u[torch.randperm(u.shape[0])]"),
}
"""Of the same names; no rule is about these, and what they need is not in the region."""

EVERY = CONSUMERS | UNUSUAL

HELPERS = {
    "masked_mean": """
def masked_mean(v, mask):
    mask = mask.unsqueeze(-1).to(v.dtype)
    return (v * mask).sum(1) / mask.sum(1).clamp(min=1)
""",
    "Branch": """
class Branch(nn.Module):
    def forward(self, z):
        return z.tanh() if z.sum() > 0 else z.sigmoid()
""",
    "RowBranch": """
class RowBranch(nn.Module):
    def forward(self, z):
        return torch.stack([row.tanh() if row[0] > 0 else row.sigmoid() for row in z])
""",
    "Centred": """
class Centred(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))

    def forward(self, z):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * z.detach().mean(0)
        return z - self.mean
""",
    "Counted": """
class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, z):
        self.steps = self.steps + 1
        return z / self.steps
""",
}
"""Functions and modules that terms call, by name."""

PADDED = ("masked attention", "masked mean of a history", "last of a history")
"""Consumers of a history to which padding behind it makes no difference."""

HISTORY = ["h, t = self.items(history), self.items(target)", "m = history != 0"]
"""What consumers of a history start with."""


def of_history(consumer: str) -> bool:
    return re.search(r"\b[hmt]\b", EVERY[consumer][1].replace("'", "")) is not None

"""Recommender models written the ordinary way, for one process: nothing here knows of descompiler.

Every click-through-rate model maps ``(dense, sparse)`` to one logit per row; `NeuMF` takes users and items, `TwoTower`
the fields of both. ``layout`` chooses how the embedding tables are held, in the three ways that are common:

======== ============================================== ===========================
layout   tables                                         ids
======== ============================================== ===========================
fields   one ``nn.Embedding`` per field                 ``[rows, fields]``
offsets  one ``nn.Embedding``, each field at an offset  ``[rows, fields]``
bags     one ``nn.EmbeddingBag`` per field              ``[rows, fields, bag size]``
======== ============================================== ===========================
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

LAYOUTS = ("fields", "offsets", "bags")

# The numbers of distinct values of C1 to C26 in the Criteo Display Advertising Challenge's training set.
# fmt: off
CRITEO_CARDINALITIES = (
    1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194,
    27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572,
)
# fmt: on


class PerField(nn.Module):
    """One ``nn.Embedding`` per field: ids ``[rows, fields]`` to ``[rows, fields, dim]``."""

    def __init__(self, vocab_sizes: Sequence[int], dim: int, *, sparse: bool = False):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(v, dim, sparse=sparse) for v in vocab_sizes)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.stack([table(ids[:, i]) for i, table in enumerate(self.tables)], dim=1)


class Offset(nn.Module):
    """All fields in one ``nn.Embedding``: ids ``[rows, fields]`` to ``[rows, fields, dim]``."""

    offsets: Tensor

    def __init__(self, vocab_sizes: Sequence[int], dim: int, *, sparse: bool = False):
        super().__init__()
        self.vocab_sizes = tuple(vocab_sizes)
        self.table = nn.Embedding(sum(vocab_sizes), dim, sparse=sparse)
        # Not on the default device: a model created on the meta device would lose the values, which are no
        # parameters that could be drawn again.
        self.register_buffer("offsets", torch.empty(len(vocab_sizes), dtype=torch.int64, device="cpu"))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Write the offsets; ``model.to_empty(device=...)`` forgets them. The table resets itself."""
        starts = list(accumulate(self.vocab_sizes, initial=0))[:-1]
        with torch.no_grad():
            self.offsets.copy_(torch.tensor(starts, device="cpu"))

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids + self.offsets)


class PerFieldBags(nn.Module):
    """One ``nn.EmbeddingBag`` per field: ids ``[rows, fields, bag size]`` to ``[rows, fields, dim]``."""

    def __init__(self, vocab_sizes: Sequence[int], dim: int, *, mode: str = "sum", sparse: bool = False):
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(v, dim, mode=mode, sparse=sparse) for v in vocab_sizes)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.stack([table(ids[:, i]) for i, table in enumerate(self.tables)], dim=1)


def field_embeddings(
    vocab_sizes: Sequence[int], dim: int, *, layout: str = "fields", mode: str = "sum", sparse: bool = False
) -> nn.Module:
    """The tables of all fields in one of `LAYOUTS`; the result maps ids to ``[rows, fields, dim]``.

    Parameters
    ----------
    vocab_sizes : sequence of int
        Ids of each field.
    dim : int
        Width of an embedding.
    layout : {"fields", "offsets", "bags"}
        See the module's table.
    mode : {"sum", "mean"}
        How a bag is pooled; ignored by the other layouts.
    sparse : bool
        Whether the tables get sparse gradients.
    """
    if layout == "fields":
        return PerField(vocab_sizes, dim, sparse=sparse)
    if layout == "offsets":
        return Offset(vocab_sizes, dim, sparse=sparse)
    if layout == "bags":
        return PerFieldBags(vocab_sizes, dim, mode=mode, sparse=sparse)
    raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}; it is {layout!r}")


def mlp(
    width: int,
    hidden: Sequence[int],
    out: int | None = None,
    *,
    dropout: float = 0.0,
    batch_norm: bool = False,
) -> nn.Sequential:
    """Hidden layers (linear, batch norm, ReLU, dropout) and, if ``out`` is given, a last linear layer."""
    layers: list[nn.Module] = []
    for h in hidden:
        layers.append(nn.Linear(width, h))
        if batch_norm:
            layers.append(nn.BatchNorm1d(h))
        layers.append(nn.ReLU())
        if dropout:
            layers.append(nn.Dropout(dropout))
        width = h
    if out is not None:
        layers.append(nn.Linear(width, out))
    return nn.Sequential(*layers)


class FirstOrder(nn.Module):
    """Logistic regression's logit ``[rows, 1]``: a weight per id, a linear term of the dense features, a bias."""

    def __init__(self, vocab_sizes: Sequence[int], n_dense: int, **tables: Any):
        super().__init__()
        self.weights = field_embeddings(vocab_sizes, 1, **tables)
        self.dense = nn.Linear(n_dense, 1, bias=False) if n_dense else None
        self.bias = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reset the bias; the sub-modules reset themselves."""
        nn.init.zeros_(self.bias)

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        logit = self.weights(sparse).sum(dim=1) + self.bias
        return logit if self.dense is None else logit + self.dense(dense)


def fm_interaction(v: Tensor) -> Tensor:
    """The sum of all pairwise dot products of ``v [rows, fields, dim]``, as ``[rows, 1]``, in linear time."""
    square_of_sum = v.sum(dim=1).square()
    sum_of_square = v.square().sum(dim=1)
    return 0.5 * (square_of_sum - sum_of_square).sum(dim=1, keepdim=True)


class LogisticRegression(nn.Module):
    """A weight per id and per dense feature.

    Parameters
    ----------
    vocab_sizes : sequence of int
        Ids of each field.
    n_dense : int
        Dense features; may be 0.
    layout, mode, sparse
        See `field_embeddings`.
    """

    def __init__(
        self,
        vocab_sizes: Sequence[int],
        n_dense: int = 13,
        *,
        layout: str = "fields",
        mode: str = "sum",
        sparse: bool = False,
    ):
        super().__init__()
        self.first_order = FirstOrder(vocab_sizes, n_dense, layout=layout, mode=mode, sparse=sparse)

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        return self.first_order(dense, sparse).squeeze(1)


class FM(nn.Module):
    """Factorisation machine over the fields (Rendle, 2010); dense features enter the linear term only.

    Parameters
    ----------
    vocab_sizes : sequence of int
        Ids of each field.
    n_dense : int
        Dense features; may be 0.
    dim : int
        Width of an embedding.
    layout, mode, sparse
        See `field_embeddings`.
    """

    def __init__(
        self,
        vocab_sizes: Sequence[int],
        n_dense: int = 13,
        dim: int = 16,
        *,
        layout: str = "fields",
        mode: str = "sum",
        sparse: bool = False,
    ):
        super().__init__()
        tables: dict[str, Any] = {"layout": layout, "mode": mode, "sparse": sparse}
        self.first_order = FirstOrder(vocab_sizes, n_dense, **tables)
        self.embeddings = field_embeddings(vocab_sizes, dim, **tables)

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        logit = self.first_order(dense, sparse) + fm_interaction(self.embeddings(sparse))
        return logit.squeeze(1)


class WideDeep(nn.Module):
    """Wide & Deep (Cheng et al., 2016): logistic regression plus a multilayer perceptron on the embeddings.

    Parameters
    ----------
    vocab_sizes : sequence of int
        Ids of each field.
    n_dense : int
        Dense features; may be 0.
    dim : int
        Width of an embedding.
    hidden : sequence of int
        Widths of the hidden layers.
    dropout : float
        Probability that a hidden unit is dropped in training.
    batch_norm : bool
        Whether hidden layers are batch-normalised.
    layout, mode, sparse
        See `field_embeddings`.
    """

    def __init__(
        self,
        vocab_sizes: Sequence[int],
        n_dense: int = 13,
        dim: int = 16,
        hidden: Sequence[int] = (64, 32),
        *,
        dropout: float = 0.0,
        batch_norm: bool = False,
        layout: str = "fields",
        mode: str = "sum",
        sparse: bool = False,
    ):
        super().__init__()
        tables: dict[str, Any] = {"layout": layout, "mode": mode, "sparse": sparse}
        self.wide = FirstOrder(vocab_sizes, n_dense, **tables)
        self.embeddings = field_embeddings(vocab_sizes, dim, **tables)
        width = len(vocab_sizes) * dim + n_dense
        self.deep = mlp(width, hidden, 1, dropout=dropout, batch_norm=batch_norm)

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        x = torch.cat([self.embeddings(sparse).flatten(1), dense], dim=1)
        return (self.wide(dense, sparse) + self.deep(x)).squeeze(1)


class DNN(nn.Module):
    """A multilayer perceptron on the concatenated embeddings.

    Parameters
    ----------
    vocab_sizes : sequence of int
        Ids of each field.
    n_dense : int
        Dense features; may be 0.
    dim : int
        Width of an embedding.
    hidden : sequence of int
        Widths of the hidden layers.
    dropout : float
        Probability that a hidden unit is dropped in training.
    batch_norm : bool
        Whether hidden layers are batch-normalised.
    layout, mode, sparse
        See `field_embeddings`.
    """

    def __init__(
        self,
        vocab_sizes: Sequence[int],
        n_dense: int = 13,
        dim: int = 16,
        hidden: Sequence[int] = (64, 32),
        *,
        dropout: float = 0.0,
        batch_norm: bool = False,
        layout: str = "fields",
        mode: str = "sum",
        sparse: bool = False,
    ):
        super().__init__()
        self.embeddings = field_embeddings(vocab_sizes, dim, layout=layout, mode=mode, sparse=sparse)
        self.deep = mlp(len(vocab_sizes) * dim + n_dense, hidden, 1, dropout=dropout, batch_norm=batch_norm)

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        return self.deep(torch.cat([self.embeddings(sparse).flatten(1), dense], dim=1)).squeeze(1)


class DeepFM(nn.Module):
    """DeepFM (Guo et al., 2017): a factorisation machine and a perceptron on the same embeddings.

    Parameters
    ----------
    vocab_sizes : sequence of int
        Ids of each field.
    n_dense : int
        Dense features; may be 0.
    dim : int
        Width of an embedding.
    hidden : sequence of int
        Widths of the hidden layers.
    dropout : float
        Probability that a hidden unit is dropped in training.
    batch_norm : bool
        Whether hidden layers are batch-normalised.
    layout, mode, sparse
        See `field_embeddings`.
    """

    def __init__(
        self,
        vocab_sizes: Sequence[int],
        n_dense: int = 13,
        dim: int = 16,
        hidden: Sequence[int] = (64, 32),
        *,
        dropout: float = 0.0,
        batch_norm: bool = False,
        layout: str = "fields",
        mode: str = "sum",
        sparse: bool = False,
    ):
        super().__init__()
        tables: dict[str, Any] = {"layout": layout, "mode": mode, "sparse": sparse}
        self.first_order = FirstOrder(vocab_sizes, n_dense, **tables)
        self.embeddings = field_embeddings(vocab_sizes, dim, **tables)
        width = len(vocab_sizes) * dim + n_dense
        self.deep = mlp(width, hidden, 1, dropout=dropout, batch_norm=batch_norm)

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        v = self.embeddings(sparse)
        deep = self.deep(torch.cat([v.flatten(1), dense], dim=1))
        return (self.first_order(dense, sparse) + fm_interaction(v) + deep).squeeze(1)


class CIN(nn.Module):
    """Compressed interaction network: ``v [rows, fields, dim]`` to ``[rows, sum of layers]``.

    A layer multiplies each of its input's vectors with each of ``v``'s, coordinate by coordinate, and mixes the
    products linearly into the next layer's vectors; every layer's vectors are summed over their coordinates.
    """

    def __init__(self, fields: int, layers: Sequence[int]):
        super().__init__()
        widths = [fields, *layers]
        self.mix = nn.ModuleList(nn.Linear(w * fields, h) for w, h in zip(widths, layers, strict=False))

    def forward(self, v: Tensor) -> Tensor:
        x0 = v.transpose(1, 2)  # [rows, dim, fields]: a coordinate's products side by side
        x, sums = x0, []
        for mix in self.mix:
            products = x.unsqueeze(3) * x0.unsqueeze(2)
            x = torch.relu(mix(products.flatten(2)))
            sums.append(x.sum(dim=1))
        return torch.cat(sums, dim=1)


class XDeepFM(nn.Module):
    """xDeepFM (Lian et al., 2018): logistic regression, a compressed interaction network and a perceptron.

    Parameters
    ----------
    vocab_sizes : sequence of int
        Ids of each field.
    n_dense : int
        Dense features; may be 0.
    dim : int
        Width of an embedding.
    hidden : sequence of int
        Widths of the hidden layers.
    cin : sequence of int
        Vectors in each layer of the interaction network.
    dropout : float
        Probability that a hidden unit is dropped in training.
    batch_norm : bool
        Whether hidden layers are batch-normalised.
    layout, mode, sparse
        See `field_embeddings`.
    """

    def __init__(
        self,
        vocab_sizes: Sequence[int],
        n_dense: int = 13,
        dim: int = 16,
        hidden: Sequence[int] = (64, 32),
        *,
        cin: Sequence[int] = (16, 8),
        dropout: float = 0.0,
        batch_norm: bool = False,
        layout: str = "fields",
        mode: str = "sum",
        sparse: bool = False,
    ):
        super().__init__()
        tables: dict[str, Any] = {"layout": layout, "mode": mode, "sparse": sparse}
        self.first_order = FirstOrder(vocab_sizes, n_dense, **tables)
        self.embeddings = field_embeddings(vocab_sizes, dim, **tables)
        self.cin = CIN(len(vocab_sizes), cin)
        self.cin_out = nn.Linear(sum(cin), 1, bias=False)
        width = len(vocab_sizes) * dim + n_dense
        self.deep = mlp(width, hidden, 1, dropout=dropout, batch_norm=batch_norm)

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        v = self.embeddings(sparse)
        deep = self.deep(torch.cat([v.flatten(1), dense], dim=1))
        return (self.first_order(dense, sparse) + self.cin_out(self.cin(v)) + deep).squeeze(1)


class Cross(nn.Module):
    """One layer of a cross network: ``x0 * (x · w) + b + x``."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight so that ``x · w`` is about as large as a coordinate of x; the bias is 0."""
        nn.init.normal_(self.weight, std=len(self.weight) ** -0.5)
        nn.init.zeros_(self.bias)

    def forward(self, x0: Tensor, x: Tensor) -> Tensor:
        return x0 * (x * self.weight).sum(dim=1, keepdim=True) + self.bias + x


class DCN(nn.Module):
    """Deep & Cross Network, version 1 (Wang et al., 2017).

    Parameters
    ----------
    vocab_sizes : sequence of int
        Ids of each field.
    n_dense : int
        Dense features; may be 0.
    dim : int
        Width of an embedding.
    hidden : sequence of int
        Widths of the deep part's hidden layers.
    n_cross : int
        Layers of the cross network.
    dropout : float
        Probability that a hidden unit is dropped in training.
    batch_norm : bool
        Whether hidden layers are batch-normalised.
    layout, mode, sparse
        See `field_embeddings`.
    """

    def __init__(
        self,
        vocab_sizes: Sequence[int],
        n_dense: int = 13,
        dim: int = 16,
        hidden: Sequence[int] = (64, 32),
        *,
        n_cross: int = 2,
        dropout: float = 0.0,
        batch_norm: bool = False,
        layout: str = "fields",
        mode: str = "sum",
        sparse: bool = False,
    ):
        super().__init__()
        self.embeddings = field_embeddings(vocab_sizes, dim, layout=layout, mode=mode, sparse=sparse)
        width = len(vocab_sizes) * dim + n_dense
        self.cross = nn.ModuleList(Cross(width) for _ in range(n_cross))
        self.deep = mlp(width, hidden, dropout=dropout, batch_norm=batch_norm)
        self.out = nn.Linear(width + (hidden[-1] if hidden else width), 1)

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        x0 = torch.cat([self.embeddings(sparse).flatten(1), dense], dim=1)
        x = x0
        for layer in self.cross:
            x = layer(x0, x)
        return self.out(torch.cat([x, self.deep(x0)], dim=1)).squeeze(1)


class DLRM(nn.Module):
    """DLRM (Naumov et al., 2019): the dense features become one more vector, all pairs of vectors are multiplied.

    Parameters
    ----------
    vocab_sizes : sequence of int
        Ids of each field.
    n_dense : int
        Dense features; with 0 there is no bottom part.
    dim : int
        Width of an embedding.
    hidden : sequence of int
        Widths of the hidden layers of the bottom and of the top part.
    dropout : float
        Probability that a hidden unit is dropped in training.
    batch_norm : bool
        Whether hidden layers are batch-normalised.
    layout, mode, sparse
        See `field_embeddings`.
    """

    def __init__(
        self,
        vocab_sizes: Sequence[int],
        n_dense: int = 13,
        dim: int = 16,
        hidden: Sequence[int] = (64, 32),
        *,
        dropout: float = 0.0,
        batch_norm: bool = False,
        layout: str = "fields",
        mode: str = "sum",
        sparse: bool = False,
    ):
        super().__init__()
        layers: dict[str, Any] = {"dropout": dropout, "batch_norm": batch_norm}
        self.embeddings = field_embeddings(vocab_sizes, dim, layout=layout, mode=mode, sparse=sparse)
        self.bottom = mlp(n_dense, (*hidden, dim), **layers) if n_dense else None
        vectors = len(vocab_sizes) + bool(n_dense)
        pairs = vectors * (vectors - 1) // 2
        self.top = mlp(pairs + (dim if n_dense else 0), hidden, 1, **layers)

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        v = self.embeddings(sparse)
        if self.bottom is None:
            return self.top(self._pairs(v)).squeeze(1)
        x = self.bottom(dense)
        pairs = self._pairs(torch.cat([x.unsqueeze(1), v], dim=1))
        return self.top(torch.cat([x, pairs], dim=1)).squeeze(1)

    def _pairs(self, v: Tensor) -> Tensor:
        """Dot products of all pairs of distinct vectors."""
        i, j = torch.tril_indices(v.shape[1], v.shape[1], offset=-1, device=v.device)
        return torch.bmm(v, v.transpose(1, 2))[:, i, j]


class Tower(nn.Module):
    """Fields to one vector of width ``hidden[-1]``."""

    def __init__(
        self, vocab_sizes: Sequence[int], dim: int, hidden: Sequence[int], layers: dict[str, Any], **tables: Any
    ):
        super().__init__()
        self.embeddings = field_embeddings(vocab_sizes, dim, **tables)
        self.hidden = mlp(len(vocab_sizes) * dim, hidden[:-1], hidden[-1], **layers)

    def forward(self, fields: Tensor) -> Tensor:
        return self.hidden(self.embeddings(fields).flatten(1))


class TwoTower(nn.Module):
    """A tower over the user's fields and one over the item's; the logit is their dot product.

    Parameters
    ----------
    user_vocab_sizes, item_vocab_sizes : sequence of int
        Ids of each field.
    dim : int
        Width of an embedding.
    hidden : sequence of int
        Widths of each tower's layers; the last is the width of the dot product.
    dropout : float
        Probability that a hidden unit is dropped in training.
    batch_norm : bool
        Whether hidden layers are batch-normalised.
    layout, mode, sparse
        See `field_embeddings`.
    """

    def __init__(
        self,
        user_vocab_sizes: Sequence[int],
        item_vocab_sizes: Sequence[int],
        dim: int = 16,
        hidden: Sequence[int] = (64, 32),
        *,
        dropout: float = 0.0,
        batch_norm: bool = False,
        layout: str = "fields",
        mode: str = "sum",
        sparse: bool = False,
    ):
        super().__init__()
        layers: dict[str, Any] = {"dropout": dropout, "batch_norm": batch_norm}
        tables: dict[str, Any] = {"layout": layout, "mode": mode, "sparse": sparse}
        self.user = Tower(user_vocab_sizes, dim, hidden, layers, **tables)
        self.item = Tower(item_vocab_sizes, dim, hidden, layers, **tables)

    def forward(self, user_fields: Tensor, item_fields: Tensor) -> Tensor:
        return (self.user(user_fields) * self.item(item_fields)).sum(dim=1)


class UserItem(nn.Module):
    """Embeddings of a user and of an item, each ``[rows, dim]``."""

    def __init__(self, n_users: int, n_items: int, dim: int, *, layout: str, mode: str, sparse: bool):
        super().__init__()
        if layout == "offsets":
            self.both: nn.Module | None = Offset([n_users, n_items], dim, sparse=sparse)
        elif layout == "fields":
            self.both = None
            self.user: nn.Module = nn.Embedding(n_users, dim, sparse=sparse)
            self.item: nn.Module = nn.Embedding(n_items, dim, sparse=sparse)
        elif layout == "bags":
            self.both = None
            self.user = nn.EmbeddingBag(n_users, dim, mode=mode, sparse=sparse)
            self.item = nn.EmbeddingBag(n_items, dim, mode=mode, sparse=sparse)
        else:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}; it is {layout!r}")

    def forward(self, user: Tensor, item: Tensor) -> tuple[Tensor, Tensor]:
        if self.both is None:
            return self.user(user), self.item(item)
        v = self.both(torch.stack([user, item], dim=1))
        return v[:, 0], v[:, 1]


class NeuMF(nn.Module):
    """Neural matrix factorisation (He et al., 2017): a product of embeddings and a perceptron on others.

    Parameters
    ----------
    n_users, n_items : int
        Sizes of the two vocabularies.
    dim : int
        Width of each of the four embeddings.
    hidden : sequence of int
        Widths of the perceptron's layers.
    dropout : float
        Probability that a hidden unit is dropped in training.
    batch_norm : bool
        Whether hidden layers are batch-normalised.
    layout, mode, sparse
        See `field_embeddings`; with ``"bags"`` users and items are ``[rows, bag size]``.
    """

    def __init__(
        self,
        n_users: int,
        n_items: int,
        dim: int = 16,
        hidden: Sequence[int] = (64, 32),
        *,
        dropout: float = 0.0,
        batch_norm: bool = False,
        layout: str = "fields",
        mode: str = "sum",
        sparse: bool = False,
    ):
        super().__init__()
        tables: dict[str, Any] = {"layout": layout, "mode": mode, "sparse": sparse}
        self.gmf = UserItem(n_users, n_items, dim, **tables)
        self.mlp = UserItem(n_users, n_items, dim, **tables)
        self.deep = mlp(2 * dim, hidden, dropout=dropout, batch_norm=batch_norm)
        self.out = nn.Linear(dim + (hidden[-1] if hidden else 2 * dim), 1)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        gmf_user, gmf_item = self.gmf(user, item)
        deep = self.deep(torch.cat(self.mlp(user, item), dim=1))
        return self.out(torch.cat([gmf_user * gmf_item, deep], dim=1)).squeeze(1)


class SequentialRecommender(nn.Module):
    """Next-item recommendation: a history of items to a score of every item, with one item table for both.

    The history is encoded by a GRU (as GRU4Rec, Hidasi et al., arXiv 1511.06939) or by causal self-attention (as
    SASRec, Kang and McAuley, arXiv 1808.09781); scores are products of the last state with the item table (tied
    weights), and the loss is the cross-entropy over all items.

    Parameters
    ----------
    n_items : int
        Item ids are 1 to ``n_items``; 0 pads histories in front.
    dim : int
        Width of embeddings and states.
    length : int
        Items of a history.
    encoder : {"gru", "attention"}
        How histories are encoded.
    layers, heads : int
        Of the encoder.
    """

    causal: Tensor

    def __init__(
        self, n_items: int, dim: int = 64, *, length: int = 20, encoder: str = "gru", layers: int = 1, heads: int = 1
    ):
        super().__init__()
        if encoder not in ("gru", "attention"):
            raise ValueError(f"encoder must be gru or attention; it is {encoder!r}")
        self.items = nn.Embedding(n_items + 1, dim, padding_idx=0)
        self.gru = nn.GRU(dim, dim, layers, batch_first=True) if encoder == "gru" else None
        self.positions = nn.Embedding(length, dim) if encoder == "attention" else None
        self.attention = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, heads, 4 * dim, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(layers if encoder == "attention" else 0)
        )
        # not on the default device: a model on the meta device would lose the values
        later = torch.ones(length, length, dtype=torch.bool, device="cpu").triu(1)
        self.register_buffer("causal", later, persistent=False)

    def encode(self, history: Tensor) -> Tensor:
        """Item ids ``[rows, length]`` to the state after the last item ``[rows, dim]``."""
        x = self.items(history)
        if self.gru is not None:
            return self.gru(x)[0][:, -1]
        assert self.positions is not None
        x = x + self.positions.weight
        for layer in self.attention:
            x = layer(x, src_mask=self.causal)
        return x[:, -1]

    def forward(self, history: Tensor, target: Tensor) -> Tensor:
        """The loss of each row ``[rows]``: minus the log-probability of the target among all items."""
        return nn.functional.cross_entropy(self.scores(history), target, reduction="none")

    def scores(self, history: Tensor) -> Tensor:
        """A score of every item, padding included ``[rows, n_items + 1]``."""
        return torch.matmul(self.encode(history), self.items.weight.transpose(0, 1))

    def recommend(self, history: Tensor, k: int = 10) -> Tensor:
        """The ids of the ``k`` best items ``[rows, k]``."""
        return self.scores(history)[:, 1:].topk(k).indices + 1


class LightGCN(nn.Module):
    """Collaborative filtering by propagation over the graph of users and items (He et al., arXiv 2002.02126).

    Parameters
    ----------
    n_users, n_items : int
        Nodes of the graph.
    met : Tensor [2, pairs]
        Ids of a user and of an item that met, each pair once.
    dim : int
        Width of an embedding.
    layers : int
        Steps of propagation; the embedding of a node is the mean over all of them and the start.
    decay : float
        Weight of the squared length of the looked-up rows of the tables.
    """

    adjacency: Tensor

    def __init__(self, n_users: int, n_items: int, met: Tensor, dim: int = 64, *, layers: int = 3, decay: float = 1e-4):
        super().__init__()
        self.n_users, self.n_items, self.layers, self.decay = n_users, n_items, layers, decay
        self.users, self.items = nn.Embedding(n_users, dim), nn.Embedding(n_items, dim)
        nodes = n_users + n_items
        one = torch.stack([met[0], met[1] + n_users])
        edges = torch.cat([one, one.flip(0)], 1)
        degree = torch.bincount(edges[0], minlength=nodes).clamp(min=1).float()
        values = (degree[edges[0]] * degree[edges[1]]).rsqrt()
        matrix = torch.sparse_coo_tensor(edges, values, (nodes, nodes), check_invariants=True)
        self.register_buffer("adjacency", matrix.coalesce())

    def propagate(self) -> tuple[Tensor, ...]:
        """The embeddings of all users and of all items."""
        x = torch.cat([self.users.weight, self.items.weight])
        steps = [x]
        for _ in range(self.layers):
            x = torch.sparse.mm(self.adjacency, x)
            steps.append(x)
        return torch.stack(steps, 1).mean(1).split([self.n_users, self.n_items])

    def forward(self, user: Tensor, item: Tensor, other: Tensor) -> Tensor:
        """The loss of each row ``[rows]``: that the user prefers the item to the other one."""
        users, items = self.propagate()
        margin = (users[user] * (items[item] - items[other])).sum(-1)
        rows = torch.cat([self.users(user), self.items(item), self.items(other)], 1)
        return self.decay * rows.square().sum(-1) - nn.functional.logsigmoid(margin)


SMALL_VOCAB_SIZES = (17, 5, 101, 3, 1, 40)
"""Uneven on purpose: a table of one row, tables with fewer rows than ranks, sizes that no rank count divides."""

_SMALL: dict[str, Any] = {
    "vocab_sizes": SMALL_VOCAB_SIZES,
    "user_vocab_sizes": SMALL_VOCAB_SIZES[:2],
    "item_vocab_sizes": SMALL_VOCAB_SIZES[2:],
    "n_users": 101,
    "n_items": 40,
    "n_dense": 3,
    "dim": 4,
    "hidden": (16, 8),
    "dropout": 0.0,
    "batch_norm": False,
}

CLASSES: dict[str, type[nn.Module]] = {
    "lr": LogisticRegression,
    "fm": FM,
    "wide_deep": WideDeep,
    "dnn": DNN,
    "deepfm": DeepFM,
    "xdeepfm": XDeepFM,
    "dcn": DCN,
    "dlrm": DLRM,
    "two_tower": TwoTower,
    "neumf": NeuMF,
}

CTR_MODELS = ("lr", "fm", "wide_deep", "dnn", "deepfm", "xdeepfm", "dcn", "dlrm")
"""The models that take ``(dense, sparse)``."""


def _factory(cls: type[nn.Module]) -> Callable[..., nn.Module]:
    accepted = set(inspect.signature(cls).parameters)

    def build(layout: str = "fields", **options: Any) -> nn.Module:
        unknown = set(options) - accepted - set(_SMALL)
        if unknown:
            raise TypeError(f"{cls.__name__} has no option {', '.join(sorted(unknown))}")
        # Options that another model has are no error, so that one set of options serves all models.
        return cls(layout=layout, **{k: v for k, v in {**_SMALL, **options}.items() if k in accepted})

    build.__name__ = build.__qualname__ = f"build_{cls.__name__}"
    build.__doc__ = f"A small `{cls.__name__}`; ``options`` are those of its constructor."
    return build


MODELS: dict[str, Callable[..., nn.Module]] = {name: _factory(cls) for name, cls in CLASSES.items()}
"""Factories ``(layout="fields", **options)`` of small models; options that a model has no use for are ignored."""


def make_inputs(name: str, layout: str = "fields", batch: int = 8, seed: int = 0, bag: int = 3) -> tuple[Tensor, ...]:
    """Random inputs of a model of `MODELS` with default options.

    Parameters
    ----------
    name : str
        A key of `MODELS`.
    layout : {"fields", "offsets", "bags"}
        The model's layout.
    batch : int
        Rows; may be 0.
    seed : int
        Of the random numbers.
    bag : int
        Ids in a bag.

    Returns
    -------
    tuple of torch.Tensor
        What the model's forward takes. Ids repeat, within a bag and between the rows, wherever there is room.
    """
    generator = torch.Generator().manual_seed(seed)

    def ids(vocab_sizes: Sequence[int]) -> Tensor:
        shape = (batch, bag) if layout == "bags" else (batch,)
        columns = [torch.randint(v, shape, generator=generator) for v in vocab_sizes]
        x = torch.stack(columns, dim=1)
        if batch > 1:
            x[-1] = x[0]
        if layout == "bags":
            x[..., -1] = x[..., 0]
        return x

    if name not in MODELS:
        raise ValueError(f"no model {name!r}; there are {', '.join(MODELS)}")
    if name == "neumf":
        pair = ids([_SMALL["n_users"], _SMALL["n_items"]])
        return pair[:, 0].contiguous(), pair[:, 1].contiguous()
    if name == "two_tower":
        return ids(_SMALL["user_vocab_sizes"]), ids(_SMALL["item_vocab_sizes"])
    dense = torch.randn(batch, _SMALL["n_dense"], generator=generator)
    return dense, ids(_SMALL["vocab_sizes"])


def initialise_tables(model: nn.Module, std: float = 0.01) -> nn.Module:
    """Draw all embedding tables anew, small; PyTorch's own standard deviation of 1 trains badly in models like FM."""
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            nn.init.normal_(module.weight, std=std)
    return model


def zipf_ids(vocab_sizes: Sequence[int], shape: Sequence[int], exponent: float = 1.05, seed: int = 0) -> Tensor:
    """Ids ``[rows, fields, ...]``; id n of a field is drawn with a probability that falls as ``(n + 1) ** -exponent``.

    Drawn by inverting the continuous distribution, so tables of any size take no memory; ``exponent`` is not 1.
    """
    generator = torch.Generator().manual_seed(seed)
    columns = []
    for size in vocab_sizes:
        u = torch.rand(tuple(shape), generator=generator, dtype=torch.float64)
        x = (1 - u * (1 - float(size + 1) ** (1 - exponent))).pow(1 / (1 - exponent))  # in [1, size + 1)
        columns.append((x.long() - 1).clamp(0, size - 1))
    return torch.stack(columns, dim=1)


CRITEO_MILLION = tuple(max(1, round(v * 1e6 / sum(CRITEO_CARDINALITIES))) for v in CRITEO_CARDINALITIES)
"""`CRITEO_CARDINALITIES` scaled to a million rows in all."""


def example(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A model of `CTR_MODELS` with a million rows in 26 tables, without weights, and inputs to plan it with.

    Parameters
    ----------
    name : str
        A key of `CTR_MODELS`.

    Returns
    -------
    model : torch.nn.Module
        On the meta device; 13 dense features, dim 16, hidden layers of 400.
    example_inputs : tuple of torch.Tensor
        Dense features and ids of 1,024 rows, Zipf(1.05).
    """
    if name not in CTR_MODELS:
        raise ValueError(f"no example {name!r}; there are {', '.join(CTR_MODELS)}")
    with torch.device("meta"):
        model = MODELS[name](vocab_sizes=CRITEO_MILLION, n_dense=13, dim=16, hidden=(400, 400))
    dense = torch.randn(1024, 13, generator=torch.Generator().manual_seed(0))
    return model, (dense, zipf_ids(CRITEO_MILLION, (1024,)))


def industrial(
    name: str,
    *,
    fields: int = 50,
    ids: int = 10,
    vocabulary: int = 1_000_000,
    dim: int = 16,
    hidden: Sequence[int] = (400, 400),
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A model of `CTR_MODELS` with many ids per row in many multi-valued fields, without weights, and inputs.

    Parameters
    ----------
    name : str
        A key of `CTR_MODELS`.
    fields, ids, vocabulary : int
        Bags per row, ids in a bag, rows of each table; by default 500 ids per row, and 50 million rows.

    Returns
    -------
    model : torch.nn.Module
        On the meta device, with tables that sum their bags and without dense features.
    example_inputs : tuple of torch.Tensor
        ``[rows, 0]`` and ids ``[rows, fields, ids]`` of 8 rows, Zipf(1.05).
    """
    if name not in CTR_MODELS:
        raise ValueError(f"no model {name!r}; there are {', '.join(CTR_MODELS)}")
    vocab_sizes = [vocabulary] * fields
    with torch.device("meta"):
        model = MODELS[name]("bags", vocab_sizes=vocab_sizes, n_dense=0, dim=dim, hidden=hidden)
    return model, (torch.zeros(8, 0), zipf_ids(vocab_sizes, (8, ids)))


def deepfm_criteo() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """DeepFM at the size of the Criteo data set, without weights, and inputs to plan it with.

    Returns
    -------
    model : DeepFM
        On the meta device: 33.8 million rows of width 16 and as many of width 1.
    example_inputs : tuple of torch.Tensor
        Dense features and ids of 1,024 rows; small ids are frequent.
    """
    with torch.device("meta"):
        model = DeepFM(CRITEO_CARDINALITIES, n_dense=13, dim=16, hidden=(400, 400))
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(1024, 13, generator=generator)
    # v ** u - 1 with u uniform has the log-uniform distribution, which is Zipf's with exponent 1.
    u = torch.rand(1024, len(CRITEO_CARDINALITIES), generator=generator, dtype=torch.float64)
    sizes = torch.tensor(CRITEO_CARDINALITIES, dtype=torch.float64)
    ids = ((sizes + 1).pow(u) - 1).long().clamp(min=0).minimum(sizes.long() - 1)
    return model, (dense, ids)

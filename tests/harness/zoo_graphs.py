"""torch-geometric's models of graphs of users and items: scores of pairs, and the losses that it has for them.

A graph is no batch: it is the model's, the batch is of pairs (or walks). Layers get all nodes' embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.harness.loops import Loop, steps

USERS, ITEMS, ROWS, DIM = 8, 9, 9, 8
NODES = USERS + ITEMS
RATED = ("user", "rated", "item")
RATED_BY = ("item", "rated_by", "user")


def _draws() -> tuple[Tensor, Callable[[int, int, int], Tensor]]:
    """Edges between users and items, in both directions, and what draws nodes of a range."""
    g = torch.Generator().manual_seed(0)
    users, items = torch.randint(USERS, (30,), generator=g), torch.randint(USERS, NODES, (30,), generator=g)
    edges = torch.stack([torch.cat([users, items]), torch.cat([items, users])])
    return edges, lambda low, high, rows: torch.randint(low, high, (rows,), generator=g)


class Ranking(nn.Module):
    """LightGCN's own loss: Bayesian personalised ranking, and a term of the batch's nodes."""

    def __init__(self, model: nn.Module, edges: Tensor):
        super().__init__()
        self.model = model
        self.register_buffer("edges", edges)

    def forward(self, users: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
        pairs = torch.stack([torch.cat([users, users]), torch.cat([positives, negatives])])
        positive, negative = self.model(self.edges, pairs).chunk(2)
        return self.model.recommendation_loss(positive, negative, node_id=pairs.unique())


class Links(Ranking):
    """LightGCN's other loss: which pairs are edges."""

    def forward(self, users: Tensor, items: Tensor, labels: Tensor) -> Tensor:
        return self.model.link_pred_loss(self.model(self.edges, torch.stack([users, items])), labels)


class Encoded(nn.Module):
    """A stack of layers on embeddings of nodes, and products of what it makes of pairs."""

    def __init__(self, layers: nn.Module, edges: Tensor):
        super().__init__()
        self.nodes, self.layers = nn.Embedding(NODES, DIM), layers
        self.register_buffer("edges", edges)

    def forward(self, users: Tensor, items: Tensor, labels: Tensor) -> Tensor:
        z = self.layers(self.nodes.weight, self.edges)
        return nn.functional.binary_cross_entropy_with_logits((z[users] * z[items]).sum(-1), labels)


class Heterogeneous(nn.Module):
    """Nodes and edges of two types."""

    def __init__(self, layer: nn.Module, edges: Tensor):
        super().__init__()
        self.users, self.items, self.layer = nn.Embedding(USERS, DIM), nn.Embedding(ITEMS, DIM), layer
        rated = edges[:, : edges.shape[1] // 2] - torch.tensor([[0], [USERS]])
        self.register_buffer("rated", rated)

    def forward(self, users: Tensor, items: Tensor, labels: Tensor) -> Tensor:
        nodes = {"user": self.users.weight, "item": self.items.weight}
        z = self.layer(nodes, {RATED: self.rated, RATED_BY: self.rated.flip(0)})
        scores = (z["user"][users] * z["item"][items - USERS]).sum(-1)
        return nn.functional.binary_cross_entropy_with_logits(scores, labels)


class Walks(nn.Module):
    """MetaPath2Vec's own loss, of walks that its own loader draws."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, positives: Tensor, negatives: Tensor) -> Tensor:
        return self.model.loss(positives, negatives)


def _geometric(name: str) -> Any:
    from torch_geometric import nn as layers

    return getattr(layers, name)


def _walks() -> tuple[nn.Module, Any]:
    edges, _ = _draws()
    rated = edges[:, :30] - torch.tensor([[0], [USERS]])
    model = _geometric("MetaPath2Vec")(
        {RATED: rated, RATED_BY: rated.flip(0)},
        embedding_dim=DIM,
        metapath=[RATED, RATED_BY],
        walk_length=4,
        context_size=3,
        num_nodes_dict={"user": USERS, "item": ITEMS},
    )
    positives, negatives = next(iter(model.loader(batch_size=6)))
    rows = min(len(positives), len(negatives))
    return Walks(model), (positives[:rows], negatives[:rows])


def _encoded(name: str, **kwargs: Any) -> Callable[[Tensor], nn.Module]:
    return lambda edges: Encoded(_geometric(name)(DIM, DIM, 2, **kwargs), edges)


def _heterogeneous(edges: Tensor) -> nn.Module:
    layer = _geometric("HGTConv")(DIM, DIM, (["user", "item"], [RATED, RATED_BY]), heads=2)
    return Heterogeneous(layer, edges)


PAIRS: dict[str, Callable[[Tensor], nn.Module]] = {
    "LightGCN, ranking": lambda edges: Ranking(_geometric("LightGCN")(NODES, DIM, 2), edges),
    "LightGCN, links": lambda edges: Links(_geometric("LightGCN")(NODES, DIM, 2), edges),
    "GCN": _encoded("GCN"),
    "GraphSAGE": _encoded("GraphSAGE"),
    "GAT": _encoded("GAT"),
    "GIN": _encoded("GIN"),
    "HGTConv": _heterogeneous,
}
MODELS = (*PAIRS, "MetaPath2Vec")


def geometric(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    if name == "MetaPath2Vec":
        return _walks()
    edges, draw = _draws()
    users, items = draw(0, USERS, ROWS), draw(USERS, NODES, ROWS)
    third = draw(USERS, NODES, ROWS) if name == "LightGCN, ranking" else (items % 2).to(torch.get_default_dtype())
    return PAIRS[name](edges), (users, items, third)


def loop(name: str) -> Loop:
    """As the library's examples train them: Adam, and its loss."""
    model, inputs = geometric(name)

    def train(net: nn.Module, batches: Sequence[Any]) -> list[float]:
        return steps(net, batches, torch.optim.Adam(net.parameters(), lr=0.01))

    return Loop(model, (inputs, {}), train)

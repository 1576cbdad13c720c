"""Cost models: against measured bytes, hand-made sums, and the laws that bytes obey."""

import itertools

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

import descompiler as des
from descompiler.cost_models import baselines as models
from descompiler.cost_models import collectives
from descompiler.cost_models.baselines import BASELINES, TableUse, price
from descompiler.cost_models.cost import Cost, fused
from descompiler.cost_models.crossovers import crossovers
from descompiler.cost_models.forms import ALL_TO_ALL, PARTIAL_SUMS, REPLICATE, UNIQUE_ROWS
from descompiler.cost_models.memory import STATE, table_bytes
from descompiler.cost_models.operators import extra_flops, linear_flops, pooling_flops
from descompiler.cost_models.symbols import UG, L, N, S, U, V, alpha, b, beta, c, d, g, gamma, i, k, l, p, s, w
from descompiler.cost_models.symbols import P as dense
from descompiler.passes import FORMS

FIELDS = [TableUse(38_462, 16, 1)] * 26  # a million rows in 26 fields, one id each


def of(name: str, **options) -> models.Priced:
    return next(x for x in price(FIELDS, 0, ranks=4, rows=options.pop("rows", 1024), **options) if x.name == name)


@pytest.mark.parametrize(
    ("name", "rows", "measured_bytes"),
    [
        ("TorchRec row-wise", 1024, 15.8e6),
        ("TorchRec row-wise", 4096, 63.4e6),
        ("TorchRec table-wise", 1024, 2.81e6),
        ("TorchRec table-wise", 4096, 11.2e6),
        ("data parallel, dense gradients", 1024, 96.1e6),
    ],
)
def test_bytes_that_interface_counters_saw(name, rows, measured_bytes):
    """TorchRec 1.8.0 and DistributedDataParallel training FM on gloo, 4 ranks, headers of the protocols included."""
    assert of(name, rows=rows, backend="gloo").sent_bytes == pytest.approx(measured_bytes, rel=0.01)


def test_limits_of_table_row_wise():
    """On one node it is row-wise; with one rank a node it is table-wise."""
    assert of("TorchRec table-row-wise", ranks_per_node=4).sent_bytes == of("TorchRec row-wise").sent_bytes
    assert of("TorchRec table-row-wise", ranks_per_node=1).sent_bytes == of("TorchRec table-wise").sent_bytes
    between = of("TorchRec table-row-wise", ranks_per_node=2).sent_bytes
    ids, inside, across = 3 / 4 * (8 + 2 * 4), 2 * (2 - 1) * 64, 2 * (4 - 2) / 4 * 64
    assert between == pytest.approx(26 * 1024 * (ids + inside + across))


def test_limits_of_2d():
    """On one node it is table-wise; with one rank a node it is data parallel."""
    name, between = "TorchRec 2D, table-wise in nodes", of("TorchRec 2D, table-wise in nodes", ranks_per_node=2)
    one_node, table_wise = of(name, ranks_per_node=4), of("TorchRec table-wise")
    assert (one_node.sent_bytes, one_node.busiest_bytes) == (table_wise.sent_bytes, table_wise.busiest_bytes)
    replicas, dense_gradients = of(name, ranks_per_node=1), of("data parallel, dense gradients")
    assert (replicas.sent_bytes, replicas.busiest_bytes) == (dense_gradients.sent_bytes, dense_gradients.busiest_bytes)
    # 13 tables a rank: half of its batch to the other rank of the node, and each half of the weights to the other node
    inside, weights = 1024 / 2 * (8 + 4 + 2 * 64), 38_462 * 64 / 2
    assert between.sent_bytes == pytest.approx(26 * (inside + weights)) == between.busiest_bytes


@pytest.mark.parametrize(("name", "ranks"), [("TorchRec table-wise", 3), ("TorchRec 2D, table-wise in nodes", 6)])
def test_the_busiest_rank_of_table_wise_by_brute_force(name, ranks):
    """Also of each node of 3 ranks, which holds all tables; between two nodes a rank sends its third of the weights."""
    widths = [40, 8, 8, 8, 4]
    uses = [TableUse(100, k, 2, 1) for k in widths]
    (x,) = (x for x in price(uses, 0, ranks=ranks, rows=10, ranks_per_node=3) if x.name == name)
    weights = 100 * sum(widths) * 4 / 3 if ranks == 6 else 0
    owners = [0, 1, 2, 1, 2]  # the widest first, to the least loaded
    sent = []
    for rank in range(3):
        total = 0
        for k_, owner in zip(widths, owners, strict=True):
            if owner == rank:
                total += 2 * 10 * k_ * 4  # vectors to two other ranks
            else:
                total += 10 * (2 * 8 + 4) + 10 * k_ * 4  # ids and lengths, gradients
        sent.append(total + weights)
    assert x.sent_bytes == round(sum(sent) / 3)
    assert x.busiest_bytes == round(max(sent))


def test_what_a_strategy_costs_is_a_sum_over_tables_and_the_dense_parameters():
    one, ten = price(FIELDS[:1], 0, ranks=4, rows=64), price(FIELDS[:10], 1000, ranks=4, rows=64)
    for x, y, base in zip(one, ten, BASELINES, strict=True):
        rest = base.dense.sent_bytes().subs({N: 4, dense: 1000, s: 4})
        assert y.sent_bytes == pytest.approx(10 * x.sent_bytes + float(rest), abs=6), base.name


def test_unique_ids():
    few = [TableUse(1000, 16, 1, unique=100, unique_global=150)]
    by_name = {x.name: x.sent_bytes for x in price(few, 0, ranks=4, rows=1000)}
    assert by_name["parameter server, unique ids"] == 0.75 * 100 * (8 + 2 * 16 * 4)
    assert by_name["data parallel, sparse gradients"] == 3 * 100 * (16 * 4 + 8)
    assert by_name["mesh, the batch's rows gathered"] == 0.75 * (4 * 100 * 8 + 2 * 150 * 64)
    assert by_name["parameter server"] == 0.75 * 1000 * (8 + 2 * 16 * 4)


def test_seconds_of_a_cluster():
    cluster = des.Cluster.builtin("ethernet-10g", ranks=4)
    for x in price(FIELDS, 1000, ranks=4, rows=1024, seconds_of=cluster.seconds_of):
        assert x.seconds > x.sent_bytes / cluster.links["inter"]["all_reduce"].bytes_per_s


def test_one_rank_sends_nothing():
    assert {x.sent_bytes for x in price(FIELDS, 1000, ranks=1, rows=64)} == {0}


def test_costs_compose():
    first = Cost({"all_reduce": S}, {"all_reduce": 1}, flops=linear_flops(b, k, w), memory=V * k * s)
    total = first + first
    assert total.payload == {"all_reduce": 2 * S} and total.calls == {"all_reduce": 2}
    assert total.flops == 12 * b * k * w and total.memory == 2 * V * k * s
    together = fused([first, first])
    assert total.messages() == 2 * first.messages() and together.messages() == first.messages()
    assert together.payload == total.payload and together.calls == {"all_reduce": 1}
    assert (3 * first).payload == {"all_reduce": 3 * S} and (3 * first).calls == {"all_reduce": 1}
    a, be = alpha("all_reduce", "inter"), beta("all_reduce", "inter")
    time = total.seconds().subs({N: 4, S: 8, b: 1, k: 1, w: 1, gamma: 10})
    assert sympy.simplify(time - (120 + 2 * 6 * a + 24 * be)).free_symbols == {
        x for x in time.free_symbols if x.name.startswith("start")
    }


SMALL = {
    N: 8,
    g: 4,
    b: 64,
    L: 3,
    V: 5000,
    U: 150,
    UG: 600,
    k: 16,
    s: 4,
    i: 8,
    d: 2,
    l: 4,
    p: 1,
    c: 2,
    w: 17,
    dense: 100,
}
CURVES = {f.name: f.curve for f in FORMS if f.curve is not None} | {"all-to-all": ALL_TO_ALL, "partial": PARTIAL_SUMS}
BYTES = {
    **{x.name: x.table.sent_bytes() + x.dense.sent_bytes() for x in BASELINES},
    **CURVES,
}


@pytest.mark.parametrize("name", BYTES)
def test_bytes_scale_as_units(name):
    """In other units of a byte, elements, ids and lengths change alike, and so do the bytes."""
    formula = BYTES[name]
    if name in ("data parallel, sparse gradients", "sparse_all_gather"):
        formula = formula.subs(sympy.Integer(8), i)  # its indices are int64 always
    scaled = formula.subs({s: 3 * s, i: 3 * i, d: 3 * d, l: 3 * l}, simultaneous=True)
    assert sympy.simplify(scaled - 3 * formula) == 0


@pytest.mark.parametrize("name", BYTES)
@settings(max_examples=20)
@given(st.sampled_from([N, b, L, V, U, UG, k, s, i, d, p, w, dense]), st.integers(1, 5))
def test_bytes_never_shrink_as_anything_grows(name, symbol, factor):
    before = BYTES[name].subs(SMALL)
    assert BYTES[name].subs({**SMALL, symbol: SMALL[symbol] * factor}) >= before > 0


@pytest.mark.parametrize("name", BYTES)
def test_scaling_laws(name):
    """Per rank: a replica's dense gradients do not depend on the batch, and are bounded as ranks grow; what a batch
    looks up grows with the batch, and is bounded unless every rank needs everything."""
    formula = BYTES[name]
    per_batch = formula.subs({U: b * U, UG: b * UG}).subs(dense, 0)
    grows_with_batch = sympy.simplify(per_batch.subs(b, 2 * b) - 2 * per_batch) == 0
    weights = name in (
        "data parallel, dense gradients",
        "mesh, whole weights gathered",
        "TorchRec 2D, table-wise in nodes",
        "TorchRec data-parallel",
    )
    assert grows_with_batch == (not weights and name != "replicate")
    free = sympy.Symbol("n", positive=True)
    limit = sympy.limit(formula.subs({x: v for x, v in SMALL.items() if x is not N}).subs(N, free), free, sympy.oo)
    unbounded = {
        "data parallel, sparse gradients",
        "mesh, the batch's rows gathered",
        "TorchRec row-wise",
        "sparse_all_gather",
        "partial",
    }
    assert (limit == sympy.oo) == (name in unbounded)


def test_collectives_by_brute_force():
    """A ring, chunk by chunk: what rank 0 sends in an all-reduce and an all-gather."""
    for ranks in (2, 3, 4, 7):
        size, chunk = 420.0, 420.0 / ranks
        reduce_scatter = all_gather = 0.0
        for _ in range(ranks - 1):
            reduce_scatter += chunk
            all_gather += chunk
        assert collectives.RING.sent_bytes(size, ranks) == pytest.approx(reduce_scatter)
        assert collectives.RING_ALL_REDUCE.sent_bytes(size, ranks) == pytest.approx(reduce_scatter + all_gather)
    for ranks in (2, 4, 8):  # halving: S/2 + S/4 + ..., and back
        halves = sum(420.0 / 2**r for r in range(1, ranks.bit_length()))
        assert collectives.HALVING_DOUBLING.sent_bytes(420.0, ranks) == pytest.approx(2 * halves)
        assert collectives.RECURSIVE_DOUBLING.messages(ranks) == ranks.bit_length() - 1


def test_memory():
    # table, gradient, state: row-wise Adagrad keeps one number a row
    assert table_bytes(1000, 16, 4, "rowwise_adagrad") == 1000 * 16 * 4 * 2 + 1000 * 4
    assert table_bytes(1000, 16, 4, "adam", unique=10) == 1000 * 16 * 4 * 3 + 10 * (64 + 8)
    assert sympy.expand(table_bytes(V, k, s, "sgd") - 2 * V * k * s) == 0
    order = [table_bytes(1000, 16, 4, o) for o in ("sgd", "rowwise_adagrad", "adagrad", "adam")]
    assert order == sorted(order) and len(set(order)) == 4
    assert set(STATE) >= {"sgd", "momentum", "adagrad", "rowwise_adagrad", "adam"}


def test_flops_of_the_region():
    assert extra_flops(linear_flops(b, k, w), N, 1 / N) == 0, "in balance nothing is added"
    assert sympy.expand(extra_flops(1, N, 1) - (N - 1)) == 0, "undivided, every rank computes the global batch"
    assert pooling_flops(2, 3, 4) == 48


NUMBERS = {b: 1024, L: 26, k: 16, w: 17, s: 4, i: 4, d: 4, U: 9000}


def test_crossovers_in_closed_form():
    """The work of a DeepFM by hand: a partial of w elements pays while N w < L k."""
    (x,) = crossovers(("all-to-all", ALL_TO_ALL), ("partial sums", PARTIAL_SUMS), N, NUMBERS)
    assert sympy.simplify(x.threshold - L * k / w) == 0 and (x.first, x.second) == ("all-to-all", "partial sums")
    assert x.start == 25 and "from 25 ranks" in str(x)
    (y,) = crossovers(("replicate", REPLICATE), ("unique_rows", UNIQUE_ROWS), V, {U: 4000, k: 16, s: 4, d: 4, N: 8})
    assert y.first == "unique_rows" and y.value == pytest.approx(4000 * 132 / 128)
    assert crossovers(("unique_rows", UNIQUE_ROWS), ("unique_rows", UNIQUE_ROWS), N, NUMBERS) == []
    with pytest.raises(ValueError, match="solve for"):
        crossovers(("unique_rows", UNIQUE_ROWS), ("replicate", REPLICATE), V, {V: 3})
    with pytest.raises(ValueError, match="numbers of N, U, d, k"):
        crossovers(("unique_rows", UNIQUE_ROWS), ("replicate", REPLICATE), V, {s: 4})


@pytest.mark.parametrize("pair", list(itertools.combinations(CURVES, 2)))
@pytest.mark.parametrize("symbol", [N, V, U])
def test_crossovers_are_where_the_cheaper_one_changes(pair, symbol):
    """Each threshold against the two costs beside it, and none is missed between 2 and a million."""
    values = {**NUMBERS, V: 100_000, N: 8}
    del values[symbol]
    first, second = (CURVES[n] for n in pair)
    found = crossovers((pair[0], first), (pair[1], second), symbol, values)
    for x in found:
        for beside, cheaper in ((x.value * 1.01, x.first), (x.value * 0.99, x.second)):
            costs = {n: float(CURVES[n].subs(values).subs(symbol, beside)) for n in pair}
            assert min(costs, key=costs.get) == cheaper
    ladder = [2 * 1.5**step for step in range(33)]
    signs = [float((first - second).subs(values).subs(symbol, x)) < 0 for x in ladder]
    seen = sum(a != z for a, z in itertools.pairwise(signs))
    assert seen <= sum(ladder[0] <= x.value <= ladder[-1] for x in found)

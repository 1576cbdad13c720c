"""Passes over programs, one idea a file: what a graph is rewritten to, and how its operators and tables are divided.

`NORMALISE` is the order of the normalise passes, `RULES` the order in which placement rules are asked, `FORMS` the ways
to divide a table. Start with ``rules/linear.py`` and ``forms/row_wise.py``.

May import: runtime (its names, which emitted programs call) and below.
"""

from descompiler.graph.rewrite import Pass
from descompiler.passes.forms.column_wise import ColumnWise
from descompiler.passes.forms.fsdp import FullySharded
from descompiler.passes.forms.hot_rows import HotRows
from descompiler.passes.forms.replicate import Replicate
from descompiler.passes.forms.row_wise import RowWise
from descompiler.passes.forms.sparse_all_gather import SparseAllGather
from descompiler.passes.forms.table_wise import TableWise
from descompiler.passes.forms.unique_rows import UniqueRows
from descompiler.passes.normalise.decompose_losses import DecomposeLosses
from descompiler.passes.normalise.explicit_shapes import ExplicitShapes
from descompiler.passes.normalise.fold_constants import FoldConstants
from descompiler.passes.normalise.functionalise import Functionalise
from descompiler.passes.normalise.lookups_first import LookupsFirst
from descompiler.passes.normalise.merge_duplicates import MergeDuplicates
from descompiler.passes.normalise.recognise_bags import RecogniseBags
from descompiler.passes.normalise.recognise_lookups import RecogniseLookups
from descompiler.passes.normalise.recognise_masked_sums import RecogniseMaskedSums
from descompiler.passes.normalise.recognise_outputs import RecogniseOutputs
from descompiler.passes.normalise.remove_noops import RemoveNoops
from descompiler.passes.normalise.simplify_indexing import SimplifyIndexing
from descompiler.passes.normalise.split_sums import SplitSums
from descompiler.passes.rules.batch_norm import BatchNorm
from descompiler.passes.rules.concatenate import Concatenate
from descompiler.passes.rules.contract import Contract
from descompiler.passes.rules.elementwise import Binary, Pointwise, Unary
from descompiler.passes.rules.expand import Expand
from descompiler.passes.rules.independent import Independent
from descompiler.passes.rules.index import IndexSelect
from descompiler.passes.rules.linear import Linear
from descompiler.passes.rules.owner import OnOwner
from descompiler.passes.rules.pairs import Pairs
from descompiler.passes.rules.reduce import Reduce
from descompiler.passes.rules.view import Narrow, Permute, Reshape
from descompiler.region.rule import Rule
from descompiler.registry import Registry
from descompiler.tables.form import FORMS

NORMALISE: tuple[Pass, ...] = (
    Functionalise(),
    ExplicitShapes(),
    FoldConstants(),
    RemoveNoops(),
    RecogniseBags(),
    SimplifyIndexing(),
    MergeDuplicates(),
    RecogniseLookups(),
    LookupsFirst(),
    MergeDuplicates(),
    RecogniseMaskedSums(),
    RecogniseOutputs(),
    DecomposeLosses(),
    SplitSums(),
)
"""From a captured program to its normal form."""

RULES: Registry[Rule] = Registry(
    "rule",
    (
        OnOwner(),
        Pointwise(),
        Unary(),
        Binary(),
        Reduce(),
        Reshape(),
        Permute(),
        Narrow(),
        Concatenate(),
        Linear(),
        Contract(),
        Independent(),
        BatchNorm(),
        IndexSelect(),
        Pairs(),
        Expand(),
    ),
)
"""How operators stay in the substituted region; the first rule that can place an operator does."""

for _form in (
    Replicate(),
    SparseAllGather(),
    TableWise(),
    RowWise(),
    ColumnWise(),
    UniqueRows(),
    HotRows(),
    FullySharded(),
):
    FORMS.add(_form)

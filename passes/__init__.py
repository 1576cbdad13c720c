"""Passes over programs, one a file; the order is this tuple."""

from descompiler.form import Form
from descompiler.passes.decompose_losses import DecomposeLosses
from descompiler.passes.explicit_shapes import ExplicitShapes
from descompiler.passes.fold_constants import FoldConstants
from descompiler.passes.form_column import Column
from descompiler.passes.form_field import Field
from descompiler.passes.form_fsdp import FullySharded
from descompiler.passes.form_gather import Gather
from descompiler.passes.form_hot import Hot
from descompiler.passes.form_pull import Pull
from descompiler.passes.form_replicate import Replicate
from descompiler.passes.form_row import Row
from descompiler.passes.functionalise import Functionalise
from descompiler.passes.lookups_first import LookupsFirst
from descompiler.passes.merge_duplicates import MergeDuplicates
from descompiler.passes.recognise_bags import RecogniseBags
from descompiler.passes.recognise_lookups import RecogniseLookups
from descompiler.passes.recognise_masked_sums import RecogniseMaskedSums
from descompiler.passes.recognise_outputs import RecogniseOutputs
from descompiler.passes.remove_noops import RemoveNoops
from descompiler.passes.rule_batch_norm import BatchNorm
from descompiler.passes.rule_concatenate import Concatenate
from descompiler.passes.rule_contract import Contract
from descompiler.passes.rule_elementwise import Binary, Pointwise, Unary
from descompiler.passes.rule_expand import Expand
from descompiler.passes.rule_independent import Independent
from descompiler.passes.rule_index import IndexSelect
from descompiler.passes.rule_linear import Linear
from descompiler.passes.rule_owner import OnOwner
from descompiler.passes.rule_reduce import Reduce
from descompiler.passes.rule_view import Narrow, Permute, Reshape
from descompiler.passes.simplify_indexing import SimplifyIndexing
from descompiler.passes.split_sums import SplitSums
from descompiler.program import Pass
from descompiler.rule import Rule

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

RULES: tuple[Rule, ...] = (
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
    Expand(),
)
"""How operators stay in the substituted region; the first rule that can place an operator does."""

FORMS: tuple[Form, ...] = (Replicate(), Gather(), Field(), Row(), Column(), Pull(), Hot(), FullySharded())
"""How a weights-rich operator can be divided; where two cost the same, the first is taken."""

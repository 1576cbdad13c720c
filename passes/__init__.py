"""Passes over programs, one a file; the order is this tuple."""

from descompiler.passes.fold_constants import FoldConstants
from descompiler.passes.merge_duplicates import MergeDuplicates
from descompiler.passes.recognise_bags import RecogniseBags
from descompiler.passes.remove_noops import RemoveNoops
from descompiler.program import Pass

NORMALISE: tuple[Pass, ...] = (FoldConstants(), RemoveNoops(), RecogniseBags(), MergeDuplicates())
"""From a captured program to its normal form."""

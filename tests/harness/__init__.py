"""What tests share: ways of checking the compiler that are no tests themselves.

The validator of rules lives here, which asks every rule about every operator of a family in every placement of its
operands, runs what it emits for each rank in this one process, and compares with the operator on the whole. `calls` has
the description of one call, `family` the calls and placements, `parts` cuts numbers as placements say and puts them
together, `rules` runs and judges, `keys` lets keys of disjoint values grow, `missing` looks for placements that would
be right and that no rule offers, and writes docs/rules.md. `lookups` does for forms what `rules` does for rules.

`graph_text` reads programs from their text, for the examples of normalise passes.
"""

"""What tests share: ways of checking the compiler that are no tests themselves. Tests import from here, not from tests.

- On real ranks: `pool` has processes that stay between calls, `plans` the forms to force on every table.
- Models: `models` small ones that several tests compile, `idioms` what people write in forward, `propagation` tables
  that are used whole, `random_models` models as text, drawn at random of `consumers`, and trained in the ways of
  `training`, `zoo` and `zoo_recbole` those of public libraries, of which `sweep` writes docs/zoo.md. `failures` has
  what raises, and what was said. Here pytest leaves their asserts as they are, which it rewrites in modules of tests.
- The validator of rules asks every rule about every operator of a family in every placement of its operands, runs what
  it emits for each rank in this one process, and compares with the operator on the whole. `calls` has the description
  of one call, `family` the calls and placements, `parts` cuts numbers as placements say and puts them together,
  `rules` runs and judges, `keys` lets keys of disjoint values grow, `missing` looks for placements that would be right
  and that no rule offers, and writes docs/rules.md. `lookups` does for forms what `rules` does for rules.
- `graph_text` reads programs from their text, for the examples of normalise passes.
"""

"""What each rank can compute from its own rows, and what mixes the rows of the batch.

`scope` is what a node is said to be, `classify` finds it by symbols and on numbers (`batch_values`), `coupling` how
values that mix rows stay exact, and what crosses for it. Start with `scope.Scope`.

May import: graph and below.
"""

"""What each rank holds, and what crosses between ranks: numbers and shapes, no graphs and no process groups.

`division` says who has which stretch of a dimension; by it `pieces` says which part of a parameter a rank holds, and
`placement` which part of a value. `spans` says once what ranks have in common. `transfer` says what crosses between
them: its kinds are in `border`, `fetches`, `global_values`, `step` and `vocabulary`; a program's are the list of a
`layout.Layout`. Start with `division`, `pieces.Pieces`, `placement`, `transfer`.

May import: model, cost_models.
"""

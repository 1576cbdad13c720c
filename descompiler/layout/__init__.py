"""What each rank holds, and what crosses between ranks: numbers and shapes, no graphs and no process groups.

`pieces` says which part of a parameter a rank holds, `placement` which part of a value, `spans` says once what ranks
have in common. `exchanges` and `fetches` are what one program sends, put together in `layout.Layout`, which predicts
the bytes by the names of `traffic`. Start with `pieces.Pieces`, then `placement`.

May import: model, cost_models.
"""

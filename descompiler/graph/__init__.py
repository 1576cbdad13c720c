"""Programs: a model as a pure graph of ATen operators.

`program` is the type that passes take and return, `nodes` what can be asked of a node, `rewrite` how graphs are walked
and changed, `text` how they are printed and told apart. `leaf` is a module that no tracer goes through, `arguments`
reads calls by name, `contractions` products by letters, `slicing` says how a dimension that is divided moves through
an operator. Start with `program.Program`.

May import: layout, model, ops. Never process groups: who asks what a graph is meets no network.
"""

"""The substituted region: which operators stay where the weights are, and where their results are aggregated.

`rule` is what a placement rule has to say (``passes/rules`` are those there are), `sliced` what all of them say of
divided values, `place` asks them for every node, `cut` chooses by a minimum cut which of the placed stay, `flow` solves
it, `named` shows its graph to people. `partition` is a program with all of this decided. Start with `rule.Rule`, then
the head of `cut`, then `partition.Partition`.

May import: tables and below.
"""

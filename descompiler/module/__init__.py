"""What the user holds after `compile`: the original's names and calls, this rank's pieces and program.

`distributed` runs emitted programs, which `programs` chooses, `partial` the user's forward, both are made of `parts`;
`deferred` compiles at the first call, `state` moves weights in and out. Start with `distributed.DistributedModule`.

May import: emit, eager and below.
"""

"""This rank's program, from the graph, the splits and the chosen region.

`emit` has the order; `region` emits values on the global batch, `outside` those of own rows, in the versions that
coupling asks for; `emission` is what the two share. `stages` is what `torch.compile` gets of it. Start
with `emit.emit`.

May import: planning and below.
"""

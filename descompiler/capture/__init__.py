"""From a module to a program.

`ladder` tries the tracers of `tracers` and `leaves` in turn; `checks` accepts a graph only if it reproduces outputs and
gradients; `tape` computes again what led to ids behind code that can't be traced. Start with `ladder.capture`.

May import: passes, runtime and below.
"""

"""What emitted graphs call and that sends nothing.

`local` has lookups in a rank's own rows, pooling and scaled gradients, `vocabulary` the products whose results are
asked for in a few numbers, `functions` the functions of torch that user code calls, by kind. Start with `local.lookup`.

May import: errors.
"""

"""Models whose own Python forward runs, because no tracer captures them.

`survey` sees how a run uses each parameter, `planning` divides those that are only looked up, `parameters` know what to
do when Python uses them. Behind that, `exchange` fetches what is used, `gradients` returns what backward brings, and
`functions` are what autograd sees of both. Start with `survey`.

May import: planning and below; emit never.
"""

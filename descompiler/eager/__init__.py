"""Models whose own Python forward runs, because no tracer captures them.

`survey` sees how a run uses each parameter, `planning` divides those that are only looked up, `pieces` are parameters
that know what to do when Python uses them, `keeper` has the exchanges behind that. Start with `survey`.

May import: planning and below; emit never.
"""

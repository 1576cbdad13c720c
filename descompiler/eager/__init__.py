"""Models whose own Python forward runs, because no tracer captures them.

`recorder` runs the model and notes how each parameter is used, `survey` judges what it returns, `outline` is what the
planner sees of it, `planning` makes the plan, `measure` has the ids of samples. `parameters` know what to do when
Python uses them. Behind that, `exchange` fetches what is used, `gradients` returns what backward brings, and
`functions` are what autograd sees of both. Start with `survey`.

May import: planning and below; emit never.
"""

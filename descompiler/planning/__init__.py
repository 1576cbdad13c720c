"""What a choice of forms costs, which is the cheapest, and what is said of it.

`objective` prices one choice, `search` looks for the best, `bound` says what none can be below, `planner.choose` makes
the `plan.Plan`. `exchanges` lists what a choice's programs send, `memory` what ranks hold, `cluster` is what links can
do, `given` follows a plan of the user's, `older` reads files of earlier versions. `chosen` is what a plan holds,
`curves` where another form would win, `summary` all that it says, as tables, `explain` their text. Start with
`planner.choose`.

May import: passes, runtime and below; not capture's tracers.
"""

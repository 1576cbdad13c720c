"""The user's module, and how it is called.

`inputs` flattens what forward takes and returns, `attributes` finds what modules keep beside parameters and buffers,
`probe` makes copies to run, `folded` gives parameters of any size values in little memory, `float64` and
`random_state` put both sides of a comparison in the same arithmetic and draws. Start with `probe.blueprint`.

May import: errors.
"""

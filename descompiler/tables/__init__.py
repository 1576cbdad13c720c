"""Tables: which parameters are looked up or multiplied, and how each may be divided.

`tables` finds them, `computed` those that are looked up after arithmetic, `totals` sums over all rows of one,
`products` what is multiplied with all rows of one, `measure` how often which row is asked for. `form` is what a way to
divide a table has to say, `blocks` what most of them share; ``passes/forms`` are those there are. Start with
`tables.Operator`, then `form.Form`.

May import: classify and below.
"""

"""What runs on process groups: collectives, autograd functions that send, and what keeps ranks in step.

`runtime.Runtime` is what an emitted program calls; `communicator` counts what is sent, `agreement` has the header of a
step; `border` is the region's border, `fetch` unique rows, `global_values` what every rank has whole, `vocabulary`
products. `gradients` averages those of replicated parameters, `ranks` are those that compile together, `channels` their
process groups, which `watch` looks after. `carriers` has who sends what crosses, by kind, `messages` how values of
several dtypes share a collective. Start with `runtime`.

May import: tables and below.
"""

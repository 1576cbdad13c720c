"""What is shown: charts, drawings of graphs, one HTML page, tables of more than a plan.

`render` writes tables (`descompiler.planning.summary` has a plan's) for a terminal, JSON, Markdown, LaTeX and HTML;
`sweep` is about several plans, `measured` about clusters and audits; `graphs` and `charts` draw, `page` puts the page
together, `paper` is the published comparison. Start with `page`.

May import: check and below.
"""

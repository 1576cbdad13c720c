"""What is shown: tables, charts, drawings of graphs, one HTML page.

`sheets` makes tables of a plan, `render` prints them for a terminal, JSON, Markdown, LaTeX and HTML; `graphs` and
`charts` draw, `page` puts the page together, `paper` is the published comparison. Start with `sheets`.

May import: check and below.
"""

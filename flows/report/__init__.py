"""The report: what runs have measured, as one HTML page that needs nothing else, and as pictures for papers.

`data` gathers, `measures`, `curves`, `blocks` and `bars` draw, `paper` compares with what was published, `page` makes
the HTML, `pictures` the PNG and SVG files, `build` puts them together. Nothing here computes a model or writes SQL.
"""

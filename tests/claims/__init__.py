"""Every claim of the paper's results, measured in the tiny world: `python -m tests.claims --help`.

pipeline.py   which runs there are, and how they come about
variants.py   data for the runs that are not the demo's: folds, shuffled labels, shuffled text
lab.py        what a claim may ask of a model: answers, and what the world's truth says of them
claims.py     the claims, one function each: the paper's figure, its gate, what refutes it
figures.py    a figure for each, from numbers alone
__main__.py   the command: runs, measures, claims.csv, report.md
"""

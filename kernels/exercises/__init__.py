"""What `python -m kernels.exercise` hands out: answers.py has the bugs and the solutions, judge.py
checks a file, the others are puzzles with holes."""

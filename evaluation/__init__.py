"""Commands of evaluate.py: measurements, reports, figures, choices."""

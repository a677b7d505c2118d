"""Public human data: downloads, converters, evaluation sets."""

"""Data of the project: formats, tokenizer, tiny world, hygiene, labeling and converters."""

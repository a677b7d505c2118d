"""The tiny world: a closed world whose facts are known, and all data that is made from it."""

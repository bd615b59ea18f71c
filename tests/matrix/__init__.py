"""Every law for every method on a tiny random model of every type that transformers has: `python -m tests.matrix`."""

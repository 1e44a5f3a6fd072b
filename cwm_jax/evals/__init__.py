"""Evaluators: each is made once and its `run()` yields (name, value), fractions and pixels."""

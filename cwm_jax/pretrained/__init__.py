"""Weights on disk: the project's own file, and how strictly it must fit a model."""

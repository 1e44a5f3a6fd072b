"""Counterfactual programs: questions put to a predictor by changing what it sees.

Pure functions that are handed a `predict_fn` and never touch its parameters. `masks` and `perturb`
say what the predictor is shown, `multimask` runs the passes, `flow` turns them into destinations.
"""

"""The frozen test set `scenes-test-v1`: the shipped weights and zero motion; the honesty test.

python -m cwm_jax.main --config configs/eval_scenes.py --workdir /tmp/scenes
`:runlocal` takes 20 scenes.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from cwm_jax.configs import base


def get_config(arg: str = "") -> ConfigDict:
  c = base.get_config()
  c.job = "evaluate"
  c.evaluate.trackers = ("mm10", "mm1", "student-tiny", "zero", "phase")
  c.evaluate.scenes = 20 if arg == "runlocal" else 500
  return c

"""How far destinations move when the predictor computes in bfloat16 instead of float32.

Run by `launch/bench bf16`, on points of `scenes-test-v1` with the shipped weights.
"""

from __future__ import annotations

import argparse
import json
import sys

import bench_facts
import numpy as np

from cwm_jax import progress
from cwm_jax.evals import scenes
from cwm_jax.tracker import Tracker

SAME_PX = 1.0  # in pixels of the scenes, which are 256 x 256


def main() -> int:
  """Prints the row."""
  parser = argparse.ArgumentParser(prog="launch/bench bf16", description=__doc__.split("\n\n")[0])
  parser.add_argument("--points", type=int, default=500)
  parser.add_argument("--masks", type=int, default=10)
  parser.add_argument("--readout", default="window", choices=["argmax", "soft", "window"])
  parser.add_argument("--attention-dtype", default="float32", choices=["float32", "bfloat16"])
  options = parser.parse_args()
  if options.points < 1:
    parser.error("points are 1 or more")
  compilations = progress.CompilationCounter()
  trackers = [
    Tracker.load(num_masks=options.masks, readout=options.readout, **dtypes)
    for dtypes in ({}, dict(dtype="bfloat16", attention_dtype=options.attention_dtype))
  ]
  found = []
  for batch in scenes.scenes_test_v1(limit=-(-options.points // scenes.POINTS)):
    both = [tracker.pairs(batch.frames, batch.points_xy).xy for tracker in trackers]
    found.append(np.stack(both).reshape(2, -1, 2))
  full, half = np.concatenate(found, axis=1)[:, : options.points]
  moved = np.linalg.norm(half - full, axis=-1)
  row = bench_facts.row(
    "bf16",
    compilations=compilations.count,
    share_within_1_px=round(float(np.mean(moved <= SAME_PX)), 4),
    median_px=round(float(np.median(moved)), 4),
    percentile_98_px=round(float(np.quantile(moved, 0.98)), 4),
  )
  print(json.dumps(row | vars(options)), flush=True)
  return 0


if __name__ == "__main__":
  sys.exit(main())

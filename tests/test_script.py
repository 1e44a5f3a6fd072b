"""The script of a reader who has only the README and the docstrings: it runs the first time.

It is kept as it was written; where the project changes so that it fails, the README has to say so.
"""

from __future__ import annotations

import re
import subprocess
import sys

import command_line
import numpy as np
import tiny_job

from cwm_jax import viz

SCRIPT = """
import sys
import numpy as np
import cwm_jax

clip, out = sys.argv[1:]
frames = list(cwm_jax.iter_frames(clip))
height, width = frames[0].shape[:2]
print(f"{len(frames)} frames of {width} x {height}")

tracker = cwm_jax.Tracker.load(num_masks=2, readout="window")
queries_tyx = np.array([[0, y, x] for y in (10.5, 30.5) for x in (12.5, 28.5, 44.5)])
tracks = tracker.track(frames, queries_tyx, mode="anchor")
for point, (path_xy, seen) in enumerate(zip(tracks.xy, tracks.visible)):
  moved = np.linalg.norm(path_xy[-1] - path_xy[0])
  print(f"point {point}: moved {moved:.1f} px, seen in {seen.sum()} of {len(seen)} frames")

there = tracker.flow(frames[0], frames[2], [[28.5, 20.5]])
print("flow:", there.xy[0] - [28.5, 20.5], "confidence:", there.confidence[0])
story = tracker.explain(frames[0], frames[2], [28.5, 20.5])
assert np.allclose(story.to_xy, there.xy[0], atol=1e-3)
print("strongest mask:", story.responses.max(axis=(1, 2)).argmax(), "of", len(story.masks))
flow_xy, at_xy = tracker.dense_flow(frames[0], frames[1], stride=20)
print("mean flow:", np.linalg.norm(flow_xy, axis=-1).mean(), "from", at_xy.shape[:2], "points")

params, config = cwm_jax.load_weights()
print(config["model"]["patch"], "pixel patches")
try:
  tracker.track(frames, [[0, 5, 1000]])
except cwm_jax.InputError as error:
  print("refused:", error)
np.savez(out, xy=tracks.xy, occluded=~tracks.visible)
"""


def test_thirty_lines_from_the_readme_run_the_first_time(tmp_path):
  assert len([line for line in SCRIPT.splitlines() if line.strip()]) <= 32
  clip = viz.write_mp4(tmp_path / "clip.mp4", command_line.frames(4), fps=10)
  out = tmp_path / "tracks.npz"
  done = subprocess.run(
    [sys.executable, "-c", SCRIPT, clip, out],
    capture_output=True,
    text=True,
    cwd=tmp_path,
    env=tiny_job.environment(),
  )
  assert done.returncode == 0, done.stderr
  assert "4 frames of 56 x 40" in done.stdout and "point 5: moved" in done.stdout
  assert "refused: the point (x=1000, y=5) lies outside the 56 x 40 frames" in done.stdout
  assert np.load(out)["xy"].shape == (6, 4, 2)


def _run_example(page, tmp_path):
  """A page's example, as it is written, beside a clip.mp4."""
  text = (tiny_job.ROOT / page).read_text()
  (example,) = re.findall(r"^```python\n(import .*?)^```$", text, re.MULTILINE | re.DOTALL)
  assert len(example.splitlines()) <= 12
  viz.write_mp4(tmp_path / "clip.mp4", command_line.frames(6, 64, 96), fps=10)
  done = subprocess.run(
    [sys.executable, "-c", example],
    capture_output=True,
    text=True,
    cwd=tmp_path,
    env=tiny_job.environment(XLA_FLAGS=tiny_job.QUICK),
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_the_readmes_example_runs_as_it_is_written(tmp_path):
  # Two tracks and a flow, as arrays of two numbers each, among the rest.
  said = _run_example("README.md", tmp_path)
  assert len(re.findall(r"\[ *-?\d+\.\d* +-?\d+\.\d* *\]", said)) >= 4


def test_the_example_of_a_counterfactual_of_ones_own_runs_as_it_is_written(tmp_path):
  assert _run_example("cwm_jax/counterfactual/segments.md", tmp_path).strip() == "(64, 64)"

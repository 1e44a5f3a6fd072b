"""`cwm-jax segments`: what moves along with a point of a picture."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from cwm_jax import commands, inputs, terminal, viz
from cwm_jax.counterfactual import segments
from cwm_jax.data import images


def run(
  *,
  image: str,
  at: tuple[float, float] | None,
  points: str | None,
  reading: inputs.Reading,
  out: str,
  as_json: bool,
) -> None:
  """Moves the patch under each point; writes segments.npz and segments.png.

  When it is interrupted, segments.npz holds the points up to there.

  Args:
    image: file.
    at: one point (x, y); None with `points`, or for the middle.
    points: CSV of points, instead.
    reading, out, as_json: what all commands have.

  Raises:
    InputError: anything given that cannot be used.
  """
  frame = images.read_image(image)
  h, w = frame.shape[:2]
  if points is not None:
    asked = inputs.read_points(points, (h, w), with_time=False)[:, :0:-1].copy()
  else:
    asked = np.array([at or (w / 2, h / 2)], np.float32)
  folder = inputs.output_folder(out)
  tracker = commands.load_tracker(reading)
  start = time.perf_counter()
  found: list[np.ndarray] = []

  def save_finished() -> Path:
    along = np.stack(found[:])
    return inputs.save_arrays(folder / "segments.npz", along=along, points_xy=asked[: len(along)])

  def save_early() -> str:
    return f"the first {len(found)} points' are in {save_finished()}" if found else ""

  with terminal.keeping(save_early) as saving:
    for point in terminal.progress(asked, total=len(asked), unit="points"):
      heat = tracker.ask(segments.moves_along, frame, frame, point)
      found.append(viz.resized(heat.astype(np.float32), (h, w)))
    seconds = time.perf_counter() - start
    with saving:
      files = [save_finished()]
  along = np.stack(found)
  files.append(viz.write_png(folder / "segments.png", _page(frame, along, asked)))
  shares = (along > 0).mean(axis=(1, 2))
  facts = {
    "points": asked.tolist(),
    "shares": [round(float(share), 4) for share in shares],
    "seconds": round(seconds, 2),
    "files": [str(path) for path in files],
  }
  text = f"{len(asked)} points in {seconds:.1f} s; {shares.mean():.0%} of the picture moves along"
  commands.report(facts, text + commands.written(files), as_json=as_json)


def _page(frame: np.ndarray, along: np.ndarray, points_xy: np.ndarray) -> np.ndarray:
  base = commands.shown(frame)
  factor = base.shape[1] / frame.shape[1]
  cells = [
    (
      f"x {point[0]:.0f}, y {point[1]:.0f}",
      viz.draw_points(
        viz.heat_over(base, np.maximum(heat, 0.0)), point[None] * factor, colours=[(64, 220, 255)]
      ),
    )
    for heat, point in zip(along[:9], points_xy)
  ]
  return viz.page(
    [cells[i : i + 3] for i in range(0, len(cells), 3)],
    title="What moves along with the patch under the point",
    note="Bright pixels of the picture are better explained by moving along than by staying.",
  )

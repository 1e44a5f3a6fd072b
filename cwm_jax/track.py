"""`cwm-jax track`: points through a video of any length; tracks and a video of them."""

from __future__ import annotations

import csv
import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from cwm_jax import commands, inputs, terminal, viz
from cwm_jax.types import InputError, PointFlow, Tracks

_FILES = ("tracks.npz", "tracks.csv", "overlay.mp4")
_SMALL = 360  # videos whose shorter side is below this are enlarged before they are drawn on


def run(
  *,
  video: str,
  grid: int,
  within: str | None,
  at: int,
  points: str | None,
  mode: str,
  table: bool,
  overlay: bool,
  reading: inputs.Reading,
  out: str,
  as_json: bool,
) -> None:
  """Follows points through a video; writes tracks.npz, on demand tracks.csv, and overlay.mp4.

  Frames are decoded as they are needed, so a long video takes no more memory than a short one. When
  it is interrupted, or the video proves to be damaged half-way, the tracks up to there are written.
  With new tracks all files of older ones go.

  Args:
    video: file or folder of frames.
    grid: grid x grid points of frame `at`, only where the picture `within` is bright.
    points: CSV of points, instead.
    mode: see `Tracker.track`.
    table: write tracks.csv too.
    overlay: draw overlay.mp4.
    reading, out, as_json: what all commands have.

  Raises:
    InputError: anything given that cannot be used.
  """
  clip = inputs.open_clip(video)
  queries = _queries(clip, grid=grid, within=within, at=at, points=points)
  folder = inputs.output_folder(out)
  tracker = commands.load_tracker(reading)
  columns: list[PointFlow] = []
  times_s: list[float] = []
  names = ["tracks.npz", "tracks.csv"] if table else ["tracks.npz"]

  def save_finished() -> list[Path]:
    finished = list(columns)
    tracks = Tracks(*(np.stack(values, axis=1) for values in zip(*finished)))
    kept_s = np.array(times_s[: len(finished)])
    saved = [save(folder / name, tracks, queries, clip.size_hw, kept_s) for name in names]
    inputs.remove_old((folder / name for name in _FILES if name not in names), given=video)
    return saved

  def save_early() -> str:
    if not columns:
      return ""
    files = " and ".join(str(path) for path in save_finished())
    return f"the tracks through the first {len(columns)} frames are in {files}"

  start = time.perf_counter()
  with terminal.keeping(save_early) as saving:
    frames = _noting_times(clip.timed(), times_s)
    answers = tracker.track_frames(frames, queries, mode=mode)
    for column in terminal.progress(answers, total=clip.length, unit="frames tracked"):
      columns.append(column)
    seconds = time.perf_counter() - start
    # Within the block: an interrupt from here on finds the tracks whole, or saves them.
    with saving:
      files = save_finished()
  tracks = Tracks(*(np.stack(values, axis=1) for values in zip(*columns)))
  if overlay:
    told = f"the tracks are in {' and '.join(map(str, files))}"
    files.append(_draw(folder / "overlay.mp4", clip, tracks, queries, times_s, told))
  _report(tracks, queries, seconds, files, as_json=as_json)


def save(
  path: Path,
  tracks: Tracks,
  queries_tyx: Float[np.ndarray, "n 3"],
  size_hw: tuple[int, int],
  times_s: Float[np.ndarray, " t"] | None = None,
  frame_indices: Int[np.ndarray, " t"] | None = None,
) -> Path:
  """Writes tracks as `.npz`, or as a table where the path ends in `.csv`.

  The `.npz` holds tracks_xy [N, T, 2], occluded and confidence [N, T], queries_tyx [N, 3], size_hw
  [2], and where they are given times_s [T] and frame_indices [T], which of the clip's frames those
  tracked are, where they are not all. The table has a row a point and frame: point, t, x, y,
  occluded (0 or 1), confidence.

  Raises:
    InputError: the path cannot be written.
  """
  if path.suffix == ".csv":
    return _save_table(path, tracks)
  arrays = {
    "tracks_xy": tracks.xy,
    "occluded": ~tracks.visible,
    "confidence": tracks.confidence,
    "queries_tyx": queries_tyx,
    "size_hw": np.array(size_hw),
  }
  told = {"times_s": times_s, "frame_indices": frame_indices}
  arrays |= {name: values for name, values in told.items() if values is not None}
  return inputs.save_arrays(path, **arrays)


def _save_table(path: Path, tracks: Tracks) -> Path:
  with inputs.whole(path) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
    rows = csv.writer(file)
    rows.writerow(["point", "t", "x", "y", "occluded", "confidence"])
    for point, t in itertools.product(*map(range, tracks.visible.shape)):
      x, y = tracks.xy[point, t]
      hidden = int(not tracks.visible[point, t])
      rows.writerow(
        [point, t, f"{x:.3f}", f"{y:.3f}", hidden, f"{tracks.confidence[point, t]:.4f}"]
      )
  return path


def _queries(clip: inputs.Clip, *, grid: int, within: str | None, at: int, points: str | None):
  """float32 [N, 3], (t, y, x)."""
  if points is not None:
    if within is not None or at:
      raise InputError("--in-mask and --at go with a grid; a CSV tells points and frames itself")
    return inputs.read_points(points, clip.size_hw)
  if within is None:
    xy = inputs.grid_points_xy(grid, clip.size_hw)
  else:
    xy = inputs.masked_points_xy(within, grid, clip.size_hw)
  return np.concatenate([np.full((len(xy), 1), at, np.float32), xy[:, ::-1]], axis=1)


def _noting_times(timed, times_s: list[float]) -> Iterator[np.ndarray]:
  for time_s, frame in timed:
    times_s.append(time_s)
    yield frame


def _draw(
  path: Path, clip: inputs.Clip, tracks: Tracks, queries, times_s: Sequence[float], told: str
) -> Path:
  """Draws the tracks; where that cannot be finished, `told` says what there is without it."""
  count = tracks.visible.shape[1]
  drawn = viz.draw_tracks(
    terminal.progress(itertools.islice(clip.frames(), count), total=count, unit="frames drawn"),
    tracks.xy,
    tracks.visible,
    starts=queries[:, 0].astype(int).tolist(),
    scale=2 if min(clip.size_hw) < _SMALL else 1,
  )

  def discard() -> str:
    viz.partial_path(path).unlink(missing_ok=True)
    return told

  with terminal.keeping(discard):
    return viz.write_mp4(path, drawn, fps=clip.fps, times_s=times_s)


def _report(tracks: Tracks, queries, seconds: float, files: list[Path], *, as_json: bool) -> None:
  count, num_frames = tracks.visible.shape
  asked = np.arange(num_frames) > queries[:, :1]
  facts = {
    "points": count,
    "frames": num_frames,
    "seconds": round(seconds, 2),
    "visible": round(float(tracks.visible[asked].mean()), 3) if asked.any() else None,
    "files": [str(path) for path in files],
  }
  text = f"{count} points through {num_frames} frames in {seconds:.1f} s"
  if asked.any():
    text += f"; seen in {facts['visible']:.0%} of the frames after their own"
  commands.report(facts, text + commands.written(files), as_json=as_json)

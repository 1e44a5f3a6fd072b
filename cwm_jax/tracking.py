"""Following points through a video: with which earlier frame each later one is compared.

`Tracker.track` calls this; what is asked here is answered by an engine's `ask`, so that it serves
counterfactual questions and flow networks alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from cwm_jax.types import InputError, PointFlow

MODES = ("query", "chain", "anchor")


def read_queries(
  queries_tyx: Any,
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, "n 2"]]:
  """Rows of (frame index, y, x) as int [N] frame indices and float32 [N, 2] (x, y).

  Raises:
    InputError: another shape, or numbers that name no place in a video.
  """
  queries = np.asarray(queries_tyx, np.float32)
  if queries.ndim != 2 or queries.shape[1] != 3:
    raise InputError(f"queries are rows of (frame, y, x), not an array {list(queries.shape)}")
  if not np.isfinite(queries).all():
    raise InputError("a query has a coordinate that is not a finite number")
  start = queries[:, 0].astype(int)
  if start.size and (start.min() < 0 or (start != queries[:, 0]).any()):
    raise InputError("a query's frame index is a whole number from 0 on")
  return start, np.ascontiguousarray(queries[:, :0:-1])


def check_image(image: Any) -> np.ndarray:
  """A frame as an array. Raises InputError unless it is RGB, uint8 [H, W, 3]."""
  image = np.asarray(image)
  if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape or image.dtype != np.uint8:
    raise InputError(
      f"a frame is RGB, uint8 [height, width, 3], not {image.dtype} {list(image.shape)}"
    )
  return image


def grid(size_hw: tuple[int, int], stride: int) -> Float[np.ndarray, "gy gx 2"]:
  """Centres (x, y) of the `stride` x `stride` cells that fit into a frame.

  Raises:
    InputError: a stride that does not fit.
  """
  h, w = size_hw
  if not 1 <= stride <= min(h, w):
    raise InputError(f"a stride of {stride} pixels does not fit a frame of {w} x {h}")
  x, y = np.arange(w // stride) + 0.5, np.arange(h // stride) + 0.5
  return np.stack(np.meshgrid(x, y), axis=-1).astype(np.float32) * stride


def read_grid(points_xy: Any) -> Float[np.ndarray, "gy gx 2"]:
  """Points that lie on an even grid, row by row.

  Raises:
    InputError: they do not.
  """
  points = np.asarray(points_xy, np.float32)
  if points.ndim != 3 or points.shape[2] != 2 or not points.size:
    raise InputError(f"a grid of points (x, y) is [rows, columns, 2], not {list(points.shape)}")
  x, y = np.moveaxis(points, -1, 0)
  even = (np.diff(x[0]) > 0).all() and (np.diff(y[:, 0]) > 0).all()
  even = even and all(
    np.allclose(lines, np.linspace(lines[0, 0], lines[0, -1], lines.shape[1]), rtol=0, atol=1e-2)
    for lines in (x, y.T)
  )
  if not even:
    raise InputError("the points of a grid lie at even steps, row by row and column by column")
  return points


def check_inside(points_xy: np.ndarray, size_hw: tuple[int, int]) -> None:
  """Raises InputError unless all points (x, y), at any depth, lie in an image of that size."""
  if points_xy.shape[-1:] != (2,):
    raise InputError(f"points are (x, y), [2] or [points, 2], not {list(points_xy.shape)}")
  h, w = size_hw
  inside = (points_xy >= 0).all(axis=-1) & (points_xy <= (w, h)).all(axis=-1)
  if not inside.all():
    bad = points_xy[~inside][0]
    raise InputError(f"the point (x={bad[0]:g}, y={bad[1]:g}) lies outside the {w} x {h} frames")


def ask_pairs(
  pairs: Iterable[Any], points_xy: Any, *, read: Callable[..., Any], engine: Any
) -> PointFlow:
  """Where points of many pairs of images went, as many pairs at a time as an engine takes.

  Args:
    pairs: of images of one size.
    points_xy: [P, N, 2], pixels of the images.
    read: (image, size of the ones before or None) -> (frame as the engine prepared it, its size).
    engine: has `ask` and `pairs_at_once`.

  Returns:
    xy [P, N, 2], visible [P, N], confidence [P, N].

  Raises:
    InputError: images or points that cannot be used.
  """
  points = np.asarray(points_xy, np.float32)
  if points.ndim != 3 or points.shape[2] != 2:
    raise InputError(f"points are (x, y), [pairs, points, 2], not {list(points.shape)}")
  num_pairs, num_points = points.shape[:2]
  video_hw, group, waiting, done = None, [], None, []
  for count, (first, second) in enumerate(pairs, start=1):
    if count > num_pairs:
      raise InputError(f"there are points for {num_pairs} pairs of frames, but more pairs")
    frame1, video_hw = read(first, video_hw)
    frame2, video_hw = read(second, video_hw)
    group.append((frame1, frame2))
    if len(group) == engine.pairs_at_once or count == num_pairs:
      asked = points[count - len(group) : count].reshape(-1, 2)
      check_inside(asked, video_hw)
      pair_of = np.repeat(np.arange(len(group)), num_points)
      # The device worked while these frames were read. One group at a time keeps to the budget.
      if waiting is not None:
        done.append(waiting.fetch())
      waiting, group = engine.ask(group, pair_of, asked, video_hw), []
  if waiting is None or group:
    raise InputError(f"there are points for {num_pairs} pairs of frames, but fewer pairs")
  done.append(waiting.fetch())
  joined = (np.concatenate(values) for values in zip(*done))
  return PointFlow(*(v.reshape(num_pairs, num_points, *v.shape[1:]) for v in joined))


def follow(
  frames: Iterable[tuple[Any, tuple[int, int]]],
  start: Int[np.ndarray, " n"],
  points_xy: Float[np.ndarray, "n 2"],
  *,
  mode: str,
  ask: Callable[..., Any],
  sure: float = 0.08,
) -> Iterator[PointFlow]:
  """Yields where all points are, frame by frame: xy [n, 2], visible [n], confidence [n].

  Before its query's frame a point is invisible and lies where it was asked for. Held are one late
  frame and those that points are still compared with, so memory does not grow with the video.

  Args:
    frames: (frame as the engine prepared it, its size as given).
    start: the frame of each query.
    points_xy: the queries, pixels of the frames as given.
    mode: "query": each frame is compared with the query's own, so errors do not add up. "chain":
      with the frame in which the point was last seen, so little has changed in between, and errors
      add up. "anchor": with both; the query's own is believed where it is visible and `sure`.
    ask: (pairs, pair_of, points_xy, size) -> an answer to `fetch`, as an engine has it.
    sure: confidence from which the mode "anchor" believes the comparison with the query's frame.

  Raises:
    InputError: an unknown mode, no frames, or a query beyond the last one (when that is known).
  """
  if mode not in MODES:
    raise InputError(f"the mode is {mode!r}; choose one of {', '.join(MODES)}")
  if not 0 <= sure <= 1:
    raise InputError(f"a confidence lies between 0 and 1; {sure:g} does not")
  if mode == "query":
    columns = _from_query(frames, start, points_xy, ask)
  else:
    columns = _from_last_seen(frames, start, points_xy, ask, sure if mode == "anchor" else None)
  count = 0
  for column in columns:
    yield column
    count += 1
  if not count:
    raise InputError("the video has no frames")
  if start.size and start.max() >= count:
    raise InputError(
      f"a query names frame {start.max()}, but the video has {count} frames, from 0 on"
    )


def _from_query(frames, start, points_xy, ask) -> Iterator[PointFlow]:
  kept, waiting = {}, None
  wanted = set(start.tolist())
  for t, (frame, size_hw) in enumerate(frames):
    if t in wanted:
      kept[t] = frame
    active = np.flatnonzero(start < t)
    pending = _ask(kept, start[active], points_xy[active], frame, size_hw, ask)
    # One frame late, so that the device has this frame's work while the host waits.
    if waiting is not None:
      yield _answered(*waiting)
    waiting = (_known(start, points_xy, t), active, pending)
  if waiting is not None:
    yield _answered(*waiting)


def _from_last_seen(frames, start, points_xy, ask, sure) -> Iterator[PointFlow]:
  seen_at, seen_xy = start.copy(), points_xy.copy()
  kept = {}
  for t, (frame, size_hw) in enumerate(frames):
    active = np.flatnonzero(start < t)
    column = _known(start, points_xy, t)
    if active.size:
      times, places = seen_at[active], seen_xy[active]
      if sure is not None:
        times = np.concatenate([times, start[active]])
        places = np.concatenate([places, points_xy[active]])
      answer = _ask(kept, times, places, frame, size_hw, ask).fetch()
      if sure is not None:
        answer = _believed(answer, len(active), sure)
      _fill(column, active, answer)
      found = active[answer.visible]
      seen_at[found] = t
      # A destination may lie outside the frame; the next question has to be asked inside.
      limit = np.array(size_hw[::-1], np.float32)
      seen_xy[found] = np.clip(answer.xy[answer.visible], 0, limit)
    kept[t] = frame
    needed = set(seen_at.tolist()) | (set() if sure is None else set(start.tolist()))
    kept = {time: held for time, held in kept.items() if time in needed}
    yield column


def _ask(kept, times, points_xy, frame, size_hw, ask):
  """Starts the work of one frame: each point with the frame of its own time; None for no point."""
  if not len(times):
    return None
  unique, pair_of = np.unique(times, return_inverse=True)
  return ask([(kept[time], frame) for time in unique.tolist()], pair_of, points_xy, size_hw)


def _believed(both: PointFlow, count: int, sure: float) -> PointFlow:
  """Of answers from the last frame and, after `count` of them, from the query's, one each."""
  last = PointFlow(*(values[:count] for values in both))
  query = PointFlow(*(values[count:] for values in both))
  take = query.visible & (query.confidence >= sure)
  return PointFlow(
    np.where(take[:, None], query.xy, last.xy),
    np.where(take, query.visible, last.visible),
    np.where(take, query.confidence, last.confidence),
  )


def _known(start, points_xy, t) -> PointFlow:
  """What is known of frame t before anything is asked: queries lie where they are."""
  here = start == t
  return PointFlow(points_xy.copy(), here, here.astype(np.float32))


def _answered(column: PointFlow, active: np.ndarray, pending: Any) -> PointFlow:
  """The column, once the device has answered for its active points."""
  if pending is not None:
    _fill(column, active, pending.fetch())
  return column


def _fill(column: PointFlow, active: np.ndarray, answer: PointFlow) -> None:
  for mine, theirs in zip(column, answer):
    mine[active] = theirs

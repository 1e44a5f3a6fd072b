"""What the labelling job asks about each pair, and what it writes down."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cwm_jax import geometry
from cwm_jax.types import PointFlow


def records(
  tracker: Any, pairs: np.ndarray, start: int, label: Any, seed: int
) -> Iterator[dict[str, Any]]:
  """A tracker's answers about points of some pairs, a record each (see `data.labels`).

  Args:
    tracker: has `pairs`, and `flow_grid` where `label.marks` is more than 1.
    pairs: uint8 [P, 2, H, W, 3].
    start: the first one's place in the source.
    label: a config's `label` section.
    seed: of the points.
  """
  answered = _ask_points if label.marks == 1 else _ask_grids
  points_xy, there, back_xy = answered(tracker, pairs, start, label, seed)
  away_px = np.full(points_xy.shape[:2], np.nan, np.float32)
  if label.round_trip:
    inside = ((there.xy >= 0) & (there.xy <= pairs.shape[3:1:-1])).all(axis=-1)
    away_px = np.where(inside, np.linalg.norm(back_xy - points_xy, axis=-1), np.inf)
    # NaN says that nobody asked; an answer that is no number came back nowhere.
    away_px = np.nan_to_num(away_px, nan=np.inf, posinf=np.inf)
  for i in range(len(pairs)):
    yield dict(
      index=np.int64(start + i),
      pair=pairs[i],
      points_xy=points_xy[i],
      flow_xy=(there.xy[i] - points_xy[i]).astype(np.float32),
      confidence=there.confidence[i].astype(np.float32),
      visible=there.visible[i],
      round_trip=away_px[i].astype(np.float32),
    )


def _ask_points(
  tracker: Any, pairs: np.ndarray, start: int, label: Any, seed: int
) -> tuple[np.ndarray, PointFlow, np.ndarray | None]:
  """Points drawn for each pair [P, N, 2], where they are in frame 2, and where that leads back to.

  The last is None where nobody asked for the round trip.
  """
  h, w = size_hw = pairs.shape[2:4]
  points_xy = np.stack(
    [draw_points(np.random.default_rng([seed, start + i]), label.points, size_hw)
     for i in range(len(pairs))]
  )  # fmt: skip
  there = tracker.pairs(pairs, points_xy)
  if not label.round_trip:
    return points_xy, there, None
  return points_xy, there, tracker.pairs(pairs[:, ::-1], np.clip(there.xy, 0, (w, h))).xy


def _ask_grids(
  tracker: Any, pairs: np.ndarray, start: int, label: Any, seed: int
) -> tuple[np.ndarray, PointFlow, np.ndarray | None]:
  """As `_ask_points`, of one even grid for all pairs, several points of it marked in each pass."""
  side = math.isqrt(label.points)
  step_xy = np.array(pairs.shape[3:1:-1], np.float32) / side
  rows, columns = np.indices((side, side))
  grid_xy = ((np.stack([columns, rows], axis=-1) + 0.5) * step_xy).astype(np.float32)

  def ask(first: np.ndarray, second: np.ndarray) -> PointFlow:
    return tracker.flow_grid(first, second, grid_xy, marks=label.marks)

  answers = [ask(*pair) for pair in pairs]
  there = PointFlow(
    *(np.stack(v).reshape(len(pairs), side**2, *v[0].shape[2:]) for v in zip(*answers))
  )
  points_xy = np.broadcast_to(grid_xy.reshape(-1, 2), there.xy.shape)
  if not label.round_trip:
    return points_xy, there, None
  flow_xy = jnp.stack([ask(second, first).xy - grid_xy for first, second in pairs])
  back_xy = jax.vmap(geometry.sample_bilinear)(flow_xy, jnp.asarray(there.xy / step_xy))
  return points_xy, there, there.xy + np.asarray(back_xy)


def draw_points(random: np.random.Generator, count: int, size_hw: tuple[int, int]) -> np.ndarray:
  """Pixel centres float32 [count, 2], (x, y), each in a cell of its own of a square grid."""
  side = int(np.ceil(np.sqrt(count)))
  cells = random.permutation(side * side)[:count]
  within = random.random((count, 2))
  share_xy = (np.stack([cells % side, cells // side], axis=-1) + within) / side
  return (np.floor(share_xy * size_hw[::-1]) + 0.5).astype(np.float32)

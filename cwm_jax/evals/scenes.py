"""The frozen test set `scenes-test-v1` as pictures and points: 500 scenes at 256, four points each.

Two points of a scene lie on the background and two on movers (where enough of them can be seen);
all are seen in both frames. They are drawn from the scene's seed, as frozen as the scenes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from cwm_jax.data import procedural, rendering
from cwm_jax.types import InputError

SIZE = 256
POINTS = 4


class ScenePairs(NamedTuple):
  """Some scenes of the set.

  frames:    uint8 [P, 2, 256, 256, 3], RGB.
  points_xy: float32 [P, 4, 2], pixel centres in frame 1.
  truth_xy:  float32 [P, 4, 2], where those points are in frame 2.
  mover:     bool [P, 4], True for points on an object, False for the background.
  layers:    uint8 [P, 256, 256], what is seen at each pixel of frame 1: 0 the background, 1 and up
             the objects.
  """

  frames: np.ndarray
  points_xy: np.ndarray
  truth_xy: np.ndarray
  mover: np.ndarray
  layers: np.ndarray


def check_limit(limit: int, *, what: str = "limit") -> None:
  """Raises InputError for a number of scenes, called `what`, that the set does not have."""
  count = len(procedural.scenes_test_v1()[0])
  if not 1 <= limit <= count:
    raise InputError(f"scenes-test-v1 has {count} scenes, and {what} is {limit}")


def scenes_test_v1(*, limit: int = 500, at_a_time: int = 10) -> Iterator[ScenePairs]:
  """Renders the set in its order, `at_a_time` scenes a round, the first `limit` scenes of it.

  Raises:
    InputError: there are not so many.
  """
  check_limit(limit)
  return _rounds(limit, at_a_time)


def _rounds(limit: int, at_a_time: int) -> Iterator[ScenePairs]:
  seeds, preset = procedural.scenes_test_v1()
  seeds = seeds[:limit]
  for first in range(0, len(seeds), at_a_time):
    chunk = seeds[first : first + at_a_time]
    # The last round is filled up, so that one compiled renderer serves all rounds.
    filled = chunk + chunk[:1] * (at_a_time - len(chunk))
    drawn = [procedural.draw_scene(seed, preset) for seed in filled]
    scenes = {name: np.stack([scene[name] for scene in drawn]) for name in drawn[0]}
    pair = rendering.render(scenes, size_hw=(SIZE, SIZE), texture_size=SIZE, truth=True)
    frames = np.round(np.asarray(pair.frames) * 255).astype(np.uint8)
    flow, visible, layer = (np.asarray(x) for x in (pair.flow_xy, pair.visible, pair.segments))
    picked = [
      _pick(np.random.default_rng([seed, 2]), visible[i], layer[i]) for i, seed in enumerate(chunk)
    ]
    index_yx = np.stack(picked)
    scene = np.arange(len(chunk))[:, None]
    points_xy = index_yx[..., ::-1].astype(np.float32) + 0.5
    at = (scene, index_yx[..., 0], index_yx[..., 1])
    layers = layer[: len(chunk)].astype(np.uint8)
    yield ScenePairs(frames[: len(chunk)], points_xy, points_xy + flow[at], layer[at] > 0, layers)


def _pick(random: np.random.Generator, visible: np.ndarray, layer: np.ndarray) -> np.ndarray:
  """Pixel indices (row, column) [4, 2]: background, mover, background, mover."""
  background = np.argwhere(visible & (layer == 0))
  movers = np.argwhere(visible & (layer > 0))
  either = np.argwhere(visible)
  groups = [group if len(group) > 50 else either for group in (background, movers)] * (POINTS // 2)
  return np.stack([group[int(random.random() * len(group))] for group in groups])

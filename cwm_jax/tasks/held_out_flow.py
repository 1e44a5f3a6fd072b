"""How well a flow network does in training: points of scenes that the training never sees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from cwm_jax import geometry
from cwm_jax.data import procedural, rendering
from cwm_jax.tasks import readout

_POINTS = 8  # a scene
_AT_ONCE = 8  # scenes
_SIDE = 256  # errors are pixels of an image of this size


class _Questions(NamedTuple):
  """frames float32 [P, 2, h, w, 3] in [0, 1]; points_xy and truth_xy [P, N, 2] in its pixels."""

  frames: np.ndarray
  points_xy: np.ndarray
  truth_xy: np.ndarray


class HeldOutFlow:
  """Asks a flow network about points that stay visible, preset by preset.

  Args:
    network: a `models.flow_network.FlowNetwork`.
    image_hw: pixels of the pairs.
    presets: names in `data.procedural.PRESETS`.
    num_scenes: scenes a preset; 0 asks nothing.
    before_seed: seeds are taken downwards from here; training's and labelling's lie at or above it.
    max_objects, texture_size: as for training; 0 texels take the size of what is drawn.
    supersample: scenes are drawn so many times larger and shrunk.

  Raises:
    InputError: there are not so many seeds below `before_seed`.
  """

  def __init__(
    self,
    *,
    network: Any,
    image_hw: tuple[int, int],
    presets: Sequence[str],
    num_scenes: int,
    before_seed: int,
    max_objects: int,
    texture_size: int,
    supersample: int,
  ):
    self._image_hw, self._num_scenes, self._max_objects = image_hw, num_scenes, max_objects
    # Filled up, so that every round of `_AT_ONCE` scenes is a whole one.
    count = -(-num_scenes // _AT_ONCE) * _AT_ONCE
    self._seeds = readout.held_out_seeds(count, before_seed=before_seed)
    self._presets = {name: procedural.preset_at(0, ((0, name),)) for name in presets}
    self._asked: dict[str, _Questions] = {}
    self._network, self._answer = network, None
    self._render = jax.jit(
      partial(
        rendering.render_batch,
        size_hw=tuple(image_hw),
        texture_size=texture_size,
        supersample=supersample,
        truth=True,
      )
    )

  def run(self, params: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yields, a preset each: average and median error in pixels at 256 x 256, both of answering "it
    did not move", and the median as a share of that.

    Args:
      params: of the network; may be sharded.
    """
    if not self._num_scenes:
      return
    if self._answer is None:
      self._answer = jax.jit(self._destinations, out_shardings=readout.whole(params))
    scale = _SIDE / np.array(self._image_hw[::-1], np.float32)
    for name, preset in self._presets.items():
      if name not in self._asked:
        self._asked[name] = self._ask(preset)
      asked = self._asked[name]
      found = np.concatenate(
        [
          np.asarray(self._answer(params, *(part[i : i + _AT_ONCE] for part in asked[:2])))
          for i in range(0, len(asked.frames), _AT_ONCE)
        ]
      )[: self._num_scenes]
      truth, points = (part[: self._num_scenes] for part in (asked.truth_xy, asked.points_xy))
      error = np.linalg.norm((found - truth) * scale, axis=-1)
      still = np.linalg.norm((points - truth) * scale, axis=-1)
      yield f"{name}/average", float(np.mean(error))
      yield f"{name}/median", float(np.median(error))
      yield f"{name}/still_average", float(np.mean(still))
      yield f"{name}/still_median", float(np.median(still))
      yield f"{name}/median_share", float(np.median(error) / np.median(still))

  def _destinations(self, params, frames, points_xy):
    """Where the points go, (x, y) pixels [P, N, 2]."""
    flow_xy = self._network.apply({"params": params}, frames).flow_xy
    return points_xy + jax.vmap(geometry.sample_bilinear)(flow_xy, points_xy)

  def _ask(self, preset: procedural.Preset) -> _Questions:
    parts = [
      self._ask_some(self._seeds[i : i + _AT_ONCE], preset)
      for i in range(0, len(self._seeds), _AT_ONCE)
    ]
    return _Questions(*(np.concatenate(part) for part in zip(*parts)))

  def _ask_some(self, seeds: list[int], preset: procedural.Preset) -> _Questions:
    pair = self._render(readout.scene_batch(seeds, preset, max_objects=self._max_objects))
    frames, flow_xy, visible = (np.asarray(x) for x in (pair.frames, pair.flow_xy, pair.visible))
    points = np.zeros((len(seeds), _POINTS, 2), np.float32)
    truth = points.copy()
    for i, seed in enumerate(seeds):
      places = np.argwhere(visible[i])
      rows, cols = places[np.random.default_rng(seed).integers(len(places), size=_POINTS)].T
      points[i] = np.stack([cols, rows], axis=-1) + 0.5
      truth[i] = points[i] + flow_xy[i, rows, cols]
    return _Questions(frames, points, truth)


def build(config: Any, network: Any, *, image_hw: tuple[int, int]) -> HeldOutFlow:
  """The evaluation of a job: the presets of its curriculum, as often as its `log` section says."""
  scenes = config.data.sources.scenes
  stages = [[stage] if isinstance(stage, str) else dict(stage) for _, stage in scenes.curriculum]
  return HeldOutFlow(
    network=network,
    image_hw=image_hw,
    presets=list(dict.fromkeys(name for names in stages for name in names)),
    num_scenes=config.log.eval_scenes,
    **readout.scene_settings(config),
  )

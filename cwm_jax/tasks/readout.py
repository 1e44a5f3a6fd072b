"""How well motion is read out of a predictor in training: scenes that the training never sees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import Partial

from cwm_jax import geometry
from cwm_jax.counterfactual import flow, masks, multimask, perturb
from cwm_jax.data import procedural, rendering
from cwm_jax.types import InputError

_POINTS = 4  # a scene
_MOVING = 1.0  # pixels; points that move less say nothing about reading motion
_PASSES = 64  # through the predictor at once


class _Questions(NamedTuple):
  """Held-out pairs and points whose truth is known.

  frames:    float32 [P, 2, h, w, 3], normalised.
  pair_of:   int32 [N], each point's pair.
  points_xy: float32 [N, 2], pixels of frame 1.
  truth_xy:  float32 [N, 2], where they are in frame 2.
  valid:     bool [N]; False where a scene had too few points to ask about.
  """

  frames: Any
  pair_of: np.ndarray
  points_xy: np.ndarray
  truth_xy: np.ndarray
  valid: np.ndarray


class HeldOutReadout:
  """Asks about moving points that stay visible, preset by preset.

  Args:
    model: a predictor module.
    image_hw: pixels it sees.
    mask_ratio: share of frame 2's patches hidden.
    presets: names in `data.procedural.PRESETS`.
    num_scenes: scenes a preset; 0 asks nothing.
    num_masks: masks a point (MM-N).
    before_seed: seeds are taken downwards from here; training's lie at or above it.
    max_objects, texture_size, supersample: as for training, see `rendering.render_batch`.

  Raises:
    InputError: there are not so many seeds below `before_seed`.
  """

  def __init__(
    self,
    *,
    model: Any,
    image_hw: tuple[int, int],
    mask_ratio: float,
    presets: Sequence[str],
    num_scenes: int,
    num_masks: int,
    before_seed: int,
    max_objects: int,
    texture_size: int,
    supersample: int,
  ):
    self._model, self._image_hw, self._max_objects = model, image_hw, max_objects
    self._seeds = held_out_seeds(num_scenes, before_seed=before_seed)
    self._render = jax.jit(
      partial(
        rendering.render_batch,
        size_hw=tuple(image_hw),
        texture_size=texture_size,
        supersample=supersample,
        truth=True,
      )
    )
    # As many pixels at once as are drawn without supersampling.
    self._at_once = max(1, len(self._seeds) // supersample**2)
    self._presets = {name: procedural.preset_at(0, ((0, name),)) for name in presets}
    self._grid_hw = (image_hw[0] // model.patch, image_hw[1] // model.patch)
    self._num_visible = masks.num_visible_patches(self._grid_hw, mask_ratio)
    # The same masks at every evaluation, so that a curve shows the predictor and not the draw.
    self._masks = masks.sample_masks(
      jax.random.key(0), self._grid_hw, self._num_visible, (max(1, num_masks),)
    )
    self._questions: dict[str, _Questions] = {}
    self._answer: Any = None

  def run(
    self, params: dict[str, Any], mark: perturb.Mark | None = None
  ) -> Iterator[tuple[str, float]]:
    """Yields, a preset each: average and median error in pixels, the same of answering "it did not
    move", and the median as a share of that.

    Args:
      params: of the model; may be sharded.
      mark: see `counterfactual.perturb`; None takes a red square of half a patch. Under one that
        is a `jax.tree_util.Partial`, parameters may change from call to call.
    """
    if not self._seeds:
      return
    if self._answer is None:
      self._answer = jax.jit(self._destinations, out_shardings=whole(params))
    mark = perturb.default(self._model.patch) if mark is None else mark
    mark = mark if isinstance(mark, Partial) else Partial(mark)
    for name, preset in self._presets.items():
      if name not in self._questions:
        self._questions[name] = self._ask(preset)
      asked = self._questions[name]
      if not asked.valid.any():
        continue
      found = np.asarray(
        self._answer(params, mark, asked.frames, asked.pair_of, asked.points_xy, asked.valid)
      )
      error = np.linalg.norm(found - asked.truth_xy, axis=-1)[asked.valid]
      still = np.linalg.norm(asked.points_xy - asked.truth_xy, axis=-1)[asked.valid]
      yield f"{name}/average", float(np.mean(error))
      yield f"{name}/median", float(np.median(error))
      yield f"{name}/still_average", float(np.mean(still))
      yield f"{name}/still_median", float(np.median(still))
      yield f"{name}/median_share", float(np.median(error) / np.median(still))

  def _ask(self, preset: procedural.Preset) -> _Questions:
    seeds = self._seeds
    groups = [seeds[i : i + self._at_once] for i in range(0, len(seeds), self._at_once)]
    batches = [scene_batch(group, preset, max_objects=self._max_objects) for group in groups]
    drawn = [jax.device_get(self._render(batch)) for batch in batches]
    pair = jax.tree.map(lambda *leaves: np.concatenate(leaves), *drawn)
    flow_xy, visible = pair.flow_xy, pair.visible
    shape = (len(seeds), _POINTS, 2)
    points, truth, valid = np.zeros(shape), np.zeros(shape), np.zeros(shape[:2], bool)
    for i, seed in enumerate(seeds):
      moving = np.linalg.norm(flow_xy[i], axis=-1) > _MOVING
      rows, cols = np.nonzero(visible[i] & moving)
      chosen = np.random.default_rng(seed).permutation(len(rows))[:_POINTS]
      rows, cols, count = rows[chosen], cols[chosen], len(chosen)
      points[i, :count] = np.stack([cols, rows], axis=-1) + 0.5
      truth[i, :count] = points[i, :count] + flow_xy[i, rows, cols]
      valid[i, :count] = True
    return _Questions(
      frames=np.asarray(geometry.normalise(jnp.asarray(pair.frames))),
      pair_of=np.repeat(np.arange(len(seeds), dtype=np.int32), _POINTS),
      points_xy=points.reshape(-1, 2).astype(np.float32),
      truth_xy=truth.reshape(-1, 2).astype(np.float32),
      valid=valid.reshape(-1),
    )

  def _destinations(self, params, mark, frames, pair_of, points_xy, valid):
    """Where the points go, (x, y) pixels [N, 2]."""
    patches = self._grid_hw[0] * self._grid_hw[1]
    predict = partial(
      self._model.apply, {"params": params}, num_visible=patches + self._num_visible
    )
    count = self._masks.shape[0]
    shared = jnp.broadcast_to(self._masks, (frames.shape[0], *self._masks.shape))
    clean = multimask.clean_predictions(
      predict,
      frames,
      shared,
      jnp.ones(frames.shape[0], bool),
      chunk=_PASSES,
      keep_tokens=perturb.reads_token(mark),
    )
    return flow.flow_points(
      predict,
      mark,
      frames,
      shared,
      clean,
      pair_of,
      points_xy,
      valid,
      plan=multimask.Plan(clean=_PASSES, points=max(1, _PASSES // count), masks=count),
    ).xy


def held_out_seeds(count: int, *, before_seed: int) -> list[int]:
  """Seeds of `count` scenes that are not trained on, downwards from just below `before_seed`.

  Raises:
    InputError: there are not so many.
  """
  if count > before_seed:
    raise InputError(
      f"data.sources.scenes.first_seed is {before_seed}, and the {count} held-out scenes have the "
      f"seeds below it: make it {count} or more, or log.eval_scenes 0"
    )
  return [before_seed - 1 - i for i in range(count)]


def scene_batch(
  seeds: Sequence[int], preset: procedural.Preset, *, max_objects: int
) -> dict[str, np.ndarray]:
  """Scenes of these seeds as a loader's batch, for `rendering.render_batch`."""
  scenes = [procedural.draw_scene(seed, preset, max_objects=max_objects) for seed in seeds]
  return {f"scene/{name}": np.stack([scene[name] for scene in scenes]) for name in scenes[0]}


def whole(params: Any) -> Any:
  """A sharding that puts the answer on every device that holds `params`."""
  place = jax.tree.leaves(params)[0].sharding
  return NamedSharding(place.mesh, PartitionSpec()) if isinstance(place, NamedSharding) else place


def build(
  config: Any, model: Any, *, image_hw: tuple[int, int], mask_ratio: float
) -> HeldOutReadout:
  """The read-out of a job: the presets of its curriculum, as often as its `log` section says.

  Args:
    config: a job's.
    model: a predictor module.
    image_hw: pixels it sees.
    mask_ratio: share of frame 2's patches hidden.
  """
  return HeldOutReadout(
    model=model,
    image_hw=image_hw,
    mask_ratio=mask_ratio,
    presets=presets(config.data.sources.scenes),
    num_scenes=config.log.eval_scenes,
    num_masks=config.log.eval_masks,
    **scene_settings(config),
  )


def presets(scenes: Any) -> list[str]:
  """Every preset of a curriculum, once, in its order; `worlds` where there are no scenes."""
  stages = [stage for _, stage in scenes.curriculum] if scenes.weight > 0 else ["worlds"]
  # A stage is a preset's name, or (name, weight) pairs.
  listed = [[stage] if isinstance(stage, str) else dict(stage) for stage in stages]
  return list(dict.fromkeys(name for names in listed for name in names))


def scene_settings(config: Any) -> dict[str, int]:
  """How held-out scenes are drawn: as the job's own but for photographs, from seeds below them."""
  scenes = config.data.sources.scenes
  return dict(
    before_seed=scenes.first_seed,
    max_objects=scenes.max_objects,
    texture_size=scenes.texture_size,
    supersample=scenes.supersample,
  )

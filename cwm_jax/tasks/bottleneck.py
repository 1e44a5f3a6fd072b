"""How much Psi-flow leans on the flow it is given: its loss without it, and with another pair's.

If it predicted as well without the flow, nothing would teach the perturber. Both are measured on
held-out scenes, as relative rises of the loss with their 95 % intervals.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cwm_jax import geometry
from cwm_jax.data import procedural, rendering
from cwm_jax.tasks import readout
from cwm_jax.types import FramePair

_PAIRS = 8  # through the networks at once
_NORMAL_95 = 1.96


class Probe:
  """Asks Psi-flow about scenes that training never draws.

  Args:
    image_hw: pixels of the frames.
    preset: a name in `data.procedural.PRESETS`.
    num_scenes: how many, rounded up to whole groups of 8; 0 asks nothing.
    before_seed: seeds are taken downwards from here; training's lie at or above it.
    max_objects, texture_size, supersample: as for training, see `rendering.render_batch`.

  Raises:
    InputError: there are not so many seeds below `before_seed`.
  """

  def __init__(
    self,
    *,
    image_hw: tuple[int, int],
    preset: str,
    num_scenes: int,
    before_seed: int,
    max_objects: int,
    texture_size: int,
    supersample: int,
  ):
    self._render_batch = jax.jit(
      partial(
        rendering.render_batch,
        size_hw=tuple(image_hw),
        texture_size=texture_size,
        supersample=supersample,
      )
    )
    self._preset, self._max_objects = procedural.preset_at(0, ((0, preset),)), max_objects
    # Pairs go through in whole groups, so that one program serves all.
    count = -(-num_scenes // _PAIRS) * _PAIRS
    self._seeds = readout.held_out_seeds(count, before_seed=before_seed)
    self._measure: Any = None

  @property
  def num_scenes(self) -> int:
    """How many are asked about."""
    return len(self._seeds)

  def run(self, task: Any, params: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yields bottleneck/loss; zeroed and exchanged: the relative rise and its _low and _high; and
    copy: the rise of predicting that frame 2 is frame 1; spread_px of the response.

    Args:
      task: a `joint.Joint`, the same at every call.
      params: its parameters.
    """
    if not self._seeds:
      return
    if self._measure is None:
      self._measure = jax.jit(lambda params, *asked: measure(task, params, *asked))
    found = []
    for begin in range(0, len(self._seeds), _PAIRS):
      keys = jax.vmap(jax.random.key)(np.arange(begin, begin + _PAIRS))
      pair = self._render(self._seeds[begin : begin + _PAIRS])
      found.append(jax.device_get(self._measure(params, pair, keys)))
    losses = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
    yield "bottleneck/loss", float(losses["loss"].mean())
    yield "bottleneck/spread_px", float(losses["spread_px"].mean())
    for name in ("zeroed", "exchanged", "copy"):
      rise, low, high = relative_rise(losses[name], losses["loss"])
      yield f"bottleneck/{name}", rise
      if name != "copy":
        yield f"bottleneck/{name}_low", low
        yield f"bottleneck/{name}_high", high

  def _render(self, seeds: Sequence[int]) -> FramePair:
    batch = readout.scene_batch(seeds, self._preset, max_objects=self._max_objects)
    return FramePair(np.asarray(self._render_batch(batch).frames))


def measure(task: Any, params: dict[str, Any], pair: FramePair, keys: Any) -> dict[str, Any]:
  """Numbers of each pair: Psi-flow's loss with its flow, without, with the next pair's; copying's.

  Args:
    task: a `joint.Joint`.
    params: its parameters.
    pair: frames float32 [B, 2, H, W, 3], RGB in [0, 1]; of two and more pairs.
    keys: typed keys [B].
  """
  points = task.queries(keys)
  found = task.flow(params, geometry.normalise(pair.frames), points, keys)
  given = {
    "loss": found.flow_xy,
    "zeroed": jnp.zeros_like(found.flow_xy),
    "exchanged": jnp.roll(found.flow_xy, 1, axis=0),
  }
  losses = {name: task.prediction_loss(params, pair, points, flow) for name, flow in given.items()}
  copied = jnp.mean(jnp.square(pair.frames[:, 0] - pair.frames[:, 1]), axis=(1, 2, 3))
  return {**losses, "copy": copied, "spread_px": jnp.mean(found.spread, axis=-1)}


def relative_rise(worse: np.ndarray, loss: np.ndarray) -> tuple[float, float, float]:
  """mean(worse) / mean(loss) - 1 and its 95 % interval over pairs (rise, low, high).

  Args:
    worse, loss: float [N], a pair each; the ratio's error is that of its linear part.
  """
  worse, loss = np.asarray(worse, np.float64), np.asarray(loss, np.float64)
  ratio = worse.mean() / loss.mean()
  error = (worse - ratio * loss).std(ddof=1) / np.sqrt(len(loss)) / loss.mean()
  return ratio - 1, ratio - 1 - _NORMAL_95 * error, ratio - 1 + _NORMAL_95 * error

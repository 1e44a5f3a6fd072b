"""How well a predictor fills in frame 2, against copying frame 1."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float

from cwm_jax import geometry
from cwm_jax.counterfactual import masks as masks_lib
from cwm_jax.evals import scenes
from cwm_jax.types import InputError, Prediction


class PredictionEvaluator:
  """Masked prediction on pairs of frames."""

  def __init__(
    self,
    predict_fn: Callable[[Any, Any], Any],
    batches: Iterable[Float[np.ndarray, "b 2 h w 3"]],
    *,
    patch: int,
    mask_ratio: float,
    seed: int = 0,
  ):
    """
    Args:
      predict_fn: (frames normalised, mask) -> Prediction; a `jax.tree_util.Partial` passes its
        parameters as arguments.
      batches: pairs at the predictor's size, RGB in [0, 1].
      patch, mask_ratio: the predictor's.
      seed: of the masks, one a pair.
    """
    self._predict_fn = predict_fn if isinstance(predict_fn, Partial) else Partial(predict_fn)
    self._batches, self._seed = batches, seed
    self._patch, self._mask_ratio = patch, mask_ratio

  def run(self) -> Iterator[tuple[str, float]]:
    """Yields, over hidden pixels: loss (mean squared error, normalised space), psnr (dB, RGB in
    [0, 1]), copy/loss and copy/psnr (of frame 1 as the prediction), loss_ratio.

    Raises:
      InputError: there are no pairs.
    """
    key = jax.random.key(self._seed)
    sums: list[np.ndarray] = []
    for index, frames in enumerate(self._batches):
      one = _errors(
        self._predict_fn,
        jnp.asarray(frames),
        jax.random.fold_in(key, index),
        patch=self._patch,
        mask_ratio=self._mask_ratio,
      )
      sums.append(np.asarray(one, np.float64) * frames.shape[0])
    if not sums:
      raise InputError("there are no pairs of frames to predict")
    count = sum(sums)[-1]
    loss, copied, squared, copied_squared = (sum(sums) / count)[:4]
    yield "loss", float(loss)
    yield "psnr", float(-10 * np.log10(max(squared, 1e-12)))
    yield "copy/loss", float(copied)
    yield "copy/psnr", float(-10 * np.log10(max(copied_squared, 1e-12)))
    yield "loss_ratio", float(loss / copied) if copied else float("nan")


def of_weights(
  path: str | None, *, num_scenes: int, mask_ratio: float | None = None, seed: int = 0
) -> Iterator[tuple[str, float]]:
  """How well a weights file's predictor fills in frame 2 of the first scenes of scenes-test-v1.

  Args:
    path: a weights file, or a release's name; None takes the one in the package.
    mask_ratio: None takes what the weights were trained with.
    seed: of the masks.

  Yields: as `PredictionEvaluator.run`.

  Raises:
    InputError: no such file, one that is not a weights file, or weights that predict no colours.
  """
  from cwm_jax import models
  from cwm_jax.pretrained import releases, sections, weights

  path = weights.shipped() if path is None else releases.locate(path)
  params, config = weights.load(path)
  weights.check_fit(params, config, where=f"weights file {path}")
  if not sections.predicts_colours(config):
    raise InputError(
      f"weights file {path} was trained with pretrain.target 'normalised': it predicts patches "
      "without their brightness and contrast, which cannot be compared with frame 2's colours; "
      "leave out evaluate.prediction"
    )
  settings = config["model"]
  (h, w), patch = settings["image_hw"], settings["patch"]
  ratio = settings["mask_ratio"] if mask_ratio is None else mask_ratio
  grid_hw = (h // patch, w // patch)
  num_visible = grid_hw[0] * grid_hw[1] + masks_lib.num_visible_patches(grid_hw, ratio)
  model = models.build(settings)

  def predict(params: Any, frames: Any, mask: Any) -> Prediction:
    return model.apply({"params": params}, frames, mask, num_visible=num_visible)

  pairs = (
    np.asarray(geometry.resize(jnp.asarray(p.frames) / 255.0, (h, w), antialias=True))
    for p in scenes.scenes_test_v1(limit=num_scenes, at_a_time=min(num_scenes, 10))
  )
  predict_fn = Partial(predict, jax.tree.map(jnp.asarray, params))
  yield from PredictionEvaluator(predict_fn, pairs, patch=patch, mask_ratio=ratio, seed=seed).run()


@partial(jax.jit, static_argnames=("patch", "mask_ratio"))
def _errors(
  predict_fn: Any, frames: Float[Array, "b 2 h w 3"], key: Any, *, patch: int, mask_ratio: float
) -> Float[Array, " 5"]:
  """Means over hidden pixels: squared error, that of copying, both in RGB; and 1 to count with."""
  b, _, h, w, _ = frames.shape
  grid_hw = (h // patch, w // patch)
  num_visible = masks_lib.num_visible_patches(grid_hw, mask_ratio)
  mask = masks_lib.sample_masks(key, grid_hw, num_visible, (b,))
  seen = geometry.normalise(frames)
  hidden = masks_lib.patches_to_pixels(mask[:, 1], patch)[..., None]
  image = predict_fn(seen, mask).image

  def mean(error):
    return jnp.sum(jnp.where(hidden, error**2, 0.0)) / (jnp.sum(hidden) * 3)

  rgb = jnp.clip(geometry.unnormalise(image), 0.0, 1.0)
  normalised = [mean(image - seen[:, 1]), mean(seen[:, 0] - seen[:, 1])]
  return jnp.stack(
    [*normalised, mean(rgb - frames[:, 1]), mean(frames[:, 0] - frames[:, 1]), jnp.float32(1.0)]
  )

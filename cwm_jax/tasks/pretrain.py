"""Pretraining of Psi-RGB: predict frame 2's hidden patches from frame 1 and the revealed ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cwm_jax import geometry
from cwm_jax.counterfactual import masks
from cwm_jax.models import predictor
from cwm_jax.tasks import readout
from cwm_jax.types import FramePair, InputError

LOSS_ON = ("hidden", "all")
TARGETS = ("raw", "normalised")
_HIDDEN_GREY = 0.5


@dataclasses.dataclass(frozen=True)
class Pretrain:
  """Masked prediction of frame 2.

  Attributes:
    model: a `models.predictor.Predictor`.
    image_hw: size of the frames, pixels.
    mask_ratio: share of frame 2's patches that is hidden; frame 1 is wholly visible.
    loss_on: "hidden" patches, or "all" patches of frame 2.
    target: "raw" normalised pixels, or "normalised": each patch to zero mean and unit variance.
    held_out: how motion is read out while training; None where it is not.

  Raises:
    InputError: on construction, for unknown choices or a size the patch does not divide.
  """

  model: Any
  image_hw: tuple[int, int]
  mask_ratio: float
  loss_on: str = "hidden"
  target: str = "raw"
  held_out: readout.HeldOutReadout | None = None
  # Everything is trained, from scratch unless `init_from` says otherwise.
  given: ClassVar[dict[str, Any]] = {}
  watched: ClassVar[tuple[str, ...]] = ()
  wants: ClassVar[str] = ""

  def __post_init__(self):
    if self.loss_on not in LOSS_ON:
      raise InputError(f"pretrain.loss_on is {self.loss_on!r}; choose one of {', '.join(LOSS_ON)}")
    if self.target not in TARGETS:
      raise InputError(f"pretrain.target is {self.target!r}; choose one of {', '.join(TARGETS)}")
    if any(side % self.model.patch for side in self.image_hw):
      raise InputError(
        f"model.image_hw {self.image_hw} does not divide into patches of {self.model.patch}"
      )

  @property
  def grid_hw(self) -> tuple[int, int]:
    """Patches per column and per row."""
    return self.image_hw[0] // self.model.patch, self.image_hw[1] // self.model.patch

  @property
  def num_visible(self) -> int:
    """Visible patches of frame 2."""
    return masks.num_visible_patches(self.grid_hw, self.mask_ratio)

  def init(self, key: Array) -> dict[str, Any]:
    """Fresh parameters: a nested dict of float32 arrays."""
    frames = jnp.zeros((1, 2, *self.image_hw, 3))
    mask = jnp.zeros((1, 2, *self.grid_hw), bool)
    return self.model.init(key, frames, mask, num_visible=2 * self.grid_hw[0] * self.grid_hw[1])[
      "params"
    ]

  def loss(
    self, params: dict[str, Any], pair: FramePair, keys: Array
  ) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean squared error of the predicted patches, in normalised colours.

    Args:
      params: as `init` makes them.
      pair: frames float32 [B, 2, H, W, 3], RGB in [0, 1].
      keys: typed keys [B]; each draws its pair's mask.

    Returns:
      (loss, metrics): metrics hold `loss` and `copy_loss`, the error of predicting that frame 2 is
      frame 1, over the same patches; each is a mean over pairs, so that micro-batches average.
    """
    frames, mask, predicted = self._predict(params, pair, keys)
    patch = self.model.patch
    target, copied = (self._as_target(predictor.patchify(frames[:, i], patch)) for i in (1, 0))
    hidden = mask[:, 1].reshape(mask.shape[0], -1, 1)
    weight = hidden if self.loss_on == "hidden" else jnp.ones_like(hidden)

    def error(patches):
      squares = jnp.mean(jnp.square(patches - target), axis=-1, keepdims=True)
      return jnp.sum(squares * weight) / jnp.sum(weight)

    loss = error(predictor.patchify(predicted, patch))
    return loss, {"loss": loss, "copy_loss": error(copied)}

  def pictures(
    self, params: dict[str, Any], pair: FramePair, keys: Array
  ) -> dict[str, Float[Array, "b h w 3"]]:
    """One strip a pair: frame 1, frame 2, what was revealed of it, the prediction filled in."""
    frames, mask, predicted = self._predict(params, pair, keys)
    patch = self.model.patch
    first, second = pair.frames[:, 0], pair.frames[:, 1]
    patches = predictor.patchify(predicted, patch)
    if self.target == "normalised":
      # Such a prediction has no brightness or contrast of its own: lend it the truth's.
      mean, std = _patch_statistics(predictor.patchify(frames[:, 1], patch))
      patches = patches * std + mean
    rgb = geometry.unnormalise(predictor.unpatchify(patches, self.grid_hw, patch))
    hidden = jnp.repeat(jnp.repeat(mask[:, 1], patch, axis=1), patch, axis=2)[..., None]
    shown = jnp.where(hidden, _HIDDEN_GREY, second)
    filled = jnp.where(hidden, rgb, second)
    strip = jnp.concatenate([first, second, shown, filled], axis=2)
    return {"prediction": jnp.clip(strip, 0.0, 1.0)}

  def evals(self, params: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """How well motion is read out of `params` on held-out scenes; see `readout`."""
    if self.held_out is not None:
      yield from self.held_out.run(params)

  def _predict(self, params, pair: FramePair, keys):
    """(normalised frames, mask, predicted frame 2) of a batch."""
    frames = geometry.normalise(pair.frames)
    draw = lambda key: masks.sample_masks(key, self.grid_hw, self.num_visible)  # noqa: E731
    mask = jax.vmap(draw)(keys)
    prediction = self.model.apply(
      {"params": params},
      frames,
      mask,
      num_visible=self.grid_hw[0] * self.grid_hw[1] + self.num_visible,
      keep_revealed=self.loss_on == "all",
    )
    return frames, mask, prediction.image

  def _as_target(self, patches: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    if self.target == "raw":
      return patches
    mean, std = _patch_statistics(patches)
    return (patches - mean) / std


def _patch_statistics(patches: Float[Array, "b n d"]):
  """Mean and standard deviation of each patch, over its pixels and channels."""
  mean = jnp.mean(patches, axis=-1, keepdims=True)
  return mean, jnp.sqrt(jnp.var(patches, axis=-1, keepdims=True) + 1e-6)

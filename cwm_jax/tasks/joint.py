"""Joint training of a perturber and Psi-flow: the mark is learned, without labels, by prediction.

The perturber marks frame 1 at a few queries, a frozen predictor turns the marks into flow, and
Psi-flow must predict frame 2 from frame 1 and that flow alone. It can do so only as far as the flow
is right; its error, led back through the predictor's marked passes, teaches the perturber.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float

from cwm_jax import geometry
from cwm_jax.counterfactual import gaussian, learned_flow, perturb
from cwm_jax.counterfactual import masks as masks_lib
from cwm_jax.tasks import bottleneck, joint_pictures, readout
from cwm_jax.types import FramePair, InputError

QUERIES = ("centre", "anywhere")
MASKS = ("point", "shared")
PREDICTOR, PERTURBER, FLOW_PREDICTOR = "predictor", "perturber", "flow_predictor"
# Widths go from one pixel to half the grid: on a grid of 2 there is nothing to choose.
_MIN_MARK_SIZE = 4


@dataclasses.dataclass(frozen=True)
class Joint:
  """Learning marks through a flow bottleneck. Parameters: predictor, perturber, flow_predictor.

  Attributes:
    predictor: Psi-RGB, a `models.predictor.Predictor`. It is frozen: `loss` stops its gradients,
      and the optimizer must label its parameters so.
    perturber: a `models.perturber.Perturber`.
    flow_predictor: Psi-flow: (frame1 normalised, points_xy, flow_xy) -> frame 2, RGB.
    given: parameters that `init` does not make, by their first name: the predictor's, and the
      perturber's where it begins from a file.
    image_hw: size of the frames, pixels; Psi-flow sees them so.
    predictor_hw: what the predictor sees; frames are resized to it.
    mask_ratio: share of frame 2's patches that is hidden from the predictor.
    mark_size: of `gaussian.GaussianMark`, 4 or more; pixels of an image `scale` times smaller than
      the predictor's.
    mark_settings: its other settings, `scale` among them.
    num_points: queries a pair, in patches (Psi-flow's) that all differ.
    query: "centre" of a patch, or "anywhere" in it.
    masks: each "point" has masks of its own, or those of a pair are "shared".
    num_masks: masks a point.
    inverse_temperature, order, average, protocol, points_at_once: see `learned_flow`.
    held_out: how motion is read out with the learned mark; None where it is not.
    own_mark: the mark to compare with there; None compares with nothing.
    probe: how much Psi-flow leans on the flow; None where it is not asked.

  Raises:
    InputError: on construction, for unknown choices or sizes that do not go together.
  """

  predictor: Any
  perturber: Any
  flow_predictor: Any
  given: Mapping[str, Any]
  image_hw: tuple[int, int]
  predictor_hw: tuple[int, int]
  mask_ratio: float
  mark_size: int
  mark_settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  num_points: int = 8
  query: str = "centre"
  masks: str = "point"
  num_masks: int = 1
  inverse_temperature: float = 200.0
  order: str = "release"
  average: str = "hidden"
  protocol: str = "half_pixel"
  points_at_once: int = 1
  held_out: readout.HeldOutReadout | None = None
  own_mark: perturb.Mark | None = None
  probe: bottleneck.Probe | None = None
  _own_scores: dict[str, float] = dataclasses.field(default_factory=dict)
  # Gradient norms of these are metrics of training.
  watched: ClassVar[tuple[str, ...]] = (PERTURBER, FLOW_PREDICTOR)
  wants: ClassVar[str] = ""

  def __post_init__(self):
    for name, known in (("query", QUERIES), ("masks", MASKS)):
      if getattr(self, name) not in known:
        raise InputError(
          f"joint.{name} is {getattr(self, name)!r}; choose one of {', '.join(known)}"
        )
    for hw, patch in (
      (self.image_hw, self.flow_predictor.patch),
      (self.predictor_hw, self.predictor.patch),
    ):
      if any(side % patch for side in hw):
        raise InputError(f"an image of {hw[0]} x {hw[1]} does not divide into patches of {patch}")
    gh, gw = self._query_grid
    if not 0 < self.num_points <= gh * gw:
      raise InputError(f"joint.num_points is {self.num_points}; there are {gh * gw} patches")
    for name in ("num_masks", "points_at_once"):
      if getattr(self, name) < 1:
        raise InputError(f"joint.{name} is {getattr(self, name)}; give 1 or more")
    if self.mark_size < _MIN_MARK_SIZE:
      scale = self.mark_settings.get("scale", 1)
      raise InputError(
        f"a mark of size {self.mark_size} (pixels a side, before it is enlarged by its scale of "
        f"{scale}) is too small for its widths to be learned: {_MIN_MARK_SIZE} is the least. Set "
        "perturber.size, lower perturber.scale, or name by joint.weights a predictor of larger "
        "images"
      )

  @property
  def _query_grid(self) -> tuple[int, int]:
    patch = self.flow_predictor.patch
    return self.image_hw[0] // patch, self.image_hw[1] // patch

  @property
  def _grid_hw(self) -> tuple[int, int]:
    patch = self.predictor.patch
    return self.predictor_hw[0] // patch, self.predictor_hw[1] // patch

  @property
  def _num_visible(self) -> int:
    return masks_lib.num_visible_patches(self._grid_hw, self.mask_ratio)

  def init(self, key: Array) -> dict[str, Any]:
    """Fresh parameters: a nested dict of float32 arrays. What is `given` must replace its part."""
    keys = jax.random.split(key, 3)
    frames = jnp.zeros((1, 2, *self.predictor_hw, 3))
    mask = jnp.zeros((1, 2, *self._grid_hw), bool)
    points = jnp.zeros((1, self.num_points, 2))
    everything = 2 * self._grid_hw[0] * self._grid_hw[1]
    seen = jax.eval_shape(
      partial(self.predictor.init_with_output, num_visible=everything), keys[0], frames, mask
    )[0]
    token = jnp.zeros(seen.tokens.shape[-1])
    picture = jnp.zeros((1, *self.image_hw, 3))
    return {
      PREDICTOR: self.predictor.init(keys[0], frames, mask, num_visible=everything)["params"],
      PERTURBER: self.perturber.init(keys[1], token)["params"],
      FLOW_PREDICTOR: self.flow_predictor.init(keys[2], picture, points, points)["params"],
    }

  def loss(
    self, params: dict[str, Any], pair: FramePair, keys: Array
  ) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean squared error of Psi-flow's frame 2, over all pixels, RGB in [0, 1].

    Args:
      params: as `init` makes them.
      pair: frames float32 [B, 2, H, W, 3], RGB in [0, 1].
      keys: typed keys [B]; each draws its pair's queries and masks.

    Returns:
      (loss, metrics): metrics hold `loss`; `copy_loss`, the error of predicting that frame 2 is
      frame 1; `flow_px`, the flow's mean length; `spread_px`, the mean width of the response, in
      pixels of the map it was read from: the predictor's image, under the protocol "release" the
      video's; `peak`, its mean height, in normalised units.
    """
    frames = geometry.normalise(pair.frames)
    points = self.queries(keys)
    found = self.flow(params, frames, points, keys)
    loss = jnp.mean(self.prediction_loss(params, pair, points, found.flow_xy))
    return loss, {
      "loss": loss,
      "copy_loss": jnp.mean(jnp.square(pair.frames[:, 0] - pair.frames[:, 1])),
      "flow_px": jnp.mean(jnp.linalg.norm(jax.lax.stop_gradient(found.flow_xy), axis=-1)),
      "spread_px": jnp.mean(found.spread),
      "peak": jnp.mean(found.peak),
    }

  def queries(self, keys: Array) -> Float[Array, "b n 2"]:
    """Each pair's queries, continuous (x, y), centres of pixels of the frames."""
    gh, gw = self._query_grid
    patch = self.flow_predictor.patch

    def draw(key):
      which, where = jax.random.split(jax.random.fold_in(key, 0))
      index = jax.random.permutation(which, gh * gw)[: self.num_points]
      corner_xy = jnp.stack([index % gw, index // gw], axis=-1) * patch
      inside_xy = patch // 2
      if self.query == "anywhere":
        inside_xy = jax.random.randint(where, (self.num_points, 2), 0, patch)
      return corner_xy + inside_xy + 0.5

    return jax.vmap(draw)(keys)

  def draw_masks(self, keys: Array) -> Array:
    """Each pair's masks, bool [B, num_points or 1, num_masks, 2, gh, gw]."""
    shape = (self.num_points if self.masks == "point" else 1, self.num_masks)
    draw = lambda key: masks_lib.sample_masks(  # noqa: E731
      jax.random.fold_in(key, 1), self._grid_hw, self._num_visible, shape
    )
    return jax.vmap(draw)(keys)

  def mark(self, params: dict[str, Any]) -> Partial:
    """The learned mark, as `counterfactual.perturb` has marks."""
    made = gaussian.GaussianMark(self.perturber, size=self.mark_size, **self.mark_settings)
    return Partial(made, params[PERTURBER])

  def predict_fn(self, params: dict[str, Any]) -> Any:
    """The frozen predictor: (frames, mask) -> Prediction."""
    return partial(
      self.predictor.apply,
      {"params": jax.lax.stop_gradient(params[PREDICTOR])},
      num_visible=self._grid_hw[0] * self._grid_hw[1] + self._num_visible,
    )

  def as_seen(self, frames: Float[Array, "b 2 h w 3"]) -> Float[Array, "b 2 h2 w2 3"]:
    """Normalised frames at the predictor's size."""
    return geometry.resize(frames, self.predictor_hw, antialias=self.protocol != "release")

  def flow(
    self,
    params: dict[str, Any],
    frames: Float[Array, "b 2 h w 3"],
    points_xy: Float[Array, "b n 2"],
    keys: Array,
  ) -> learned_flow.LearnedFlow:
    """The flow of the queries by the learned mark; `frames` normalised, pixels are theirs."""
    return learned_flow.learned_flow(
      self.predict_fn(params),
      self.mark(params),
      self.as_seen(frames),
      self.draw_masks(keys),
      points_xy,
      video_hw=self.image_hw,
      inverse_temperature=self.inverse_temperature,
      order=self.order,
      average=self.average,
      protocol=self.protocol,
      points_at_once=self.points_at_once,
    )

  def predict_frame2(
    self, params: dict[str, Any], frame1: Array, points_xy: Array, flow_xy: Array
  ) -> Float[Array, "b h w 3"]:
    """Psi-flow's frame 2, RGB, not clipped; `frame1` normalised."""
    return self.flow_predictor.apply({"params": params[FLOW_PREDICTOR]}, frame1, points_xy, flow_xy)

  def prediction_loss(
    self, params: dict[str, Any], pair: FramePair, points_xy: Array, flow_xy: Array
  ) -> Float[Array, " b"]:
    """Psi-flow's mean squared error, a pair each."""
    frame1 = geometry.normalise(pair.frames[:, 0])
    predicted = self.predict_frame2(params, frame1, points_xy, flow_xy)
    return jnp.mean(jnp.square(predicted - pair.frames[:, 1]), axis=(1, 2, 3))

  def pictures(
    self, params: dict[str, Any], pair: FramePair, keys: Array
  ) -> dict[str, Float[Array, "b h w 3"]]:
    """One strip a pair: frame 1, its mark seen near, the response, Psi-flow's frame 2, frame 2."""
    return {"joint": joint_pictures.strip(self, params, pair, keys)}

  def evals(self, params: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """How well the learned mark tracks held-out scenes, and how much Psi-flow leans on the flow."""
    if self.held_out is not None:
      yield from self.held_out.run(params[PREDICTOR], mark=self.mark(params))
      # The predictor is frozen: what its own mark finds is found once.
      if self.own_mark is not None and not self._own_scores:
        self._own_scores.update(self.held_out.run(params[PREDICTOR], mark=self.own_mark))
      yield from ((f"own_mark/{name}", value) for name, value in self._own_scores.items())
    if self.probe is not None:
      yield from self.probe.run(self, params)

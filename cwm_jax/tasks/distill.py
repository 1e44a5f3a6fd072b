"""A flow network learns from flow at points: a tracker's labels, or the truth of rendered scenes.

Distillation and supervised training are one task; they differ in who says where a point goes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from cwm_jax import geometry, models, tasks
from cwm_jax.configs import base
from cwm_jax.data import labels
from cwm_jax.tasks import flow_losses, held_out_flow
from cwm_jax.tasks.augment import Augmentation
from cwm_jax.types import FramePair, InputError

# Full colour in a picture of flow, as a share of the image's side.
_LONGEST = 0.25


@dataclasses.dataclass(frozen=True)
class Distill:
  """Flow at labelled points, or at points drawn where the truth is known.

  Attributes:
    network: a `models.flow_network.FlowNetwork`.
    image_hw: size of the frames, pixels.
    wants: "labels" or "truth", which the pairs must bring.
    loss_kind, gamma: see `flow_losses.sequence_loss`.
    augmentation: None changes nothing.
    min_confidence, max_round_trip: labels below, or above in pixels, do not count; nor does a point
      that the tracker took for hidden.
    num_points: of "truth", drawn anew for each pair.
    held_out: what is evaluated while training.

  Raises:
    InputError: on construction, for choices that cannot be.
  """

  network: Any
  image_hw: tuple[int, int]
  wants: str
  loss_kind: str
  gamma: float
  augmentation: Augmentation | None
  min_confidence: float
  max_round_trip: float
  num_points: int
  held_out: held_out_flow.HeldOutFlow
  # Everything is trained, from scratch unless `init_from` says otherwise.
  given: ClassVar[dict[str, Any]] = {}
  watched: ClassVar[tuple[str, ...]] = ()

  def __post_init__(self):
    if self.loss_kind not in flow_losses.LOSSES:
      choices = ", ".join(flow_losses.LOSSES)
      raise InputError(f"distill.loss is {self.loss_kind!r}; choose one of {choices}")
    if not 0 < self.gamma <= 1:
      raise InputError(f"distill.gamma is {self.gamma}; it is above 0 and at most 1")
    if self.wants == "truth" and self.num_points < 1:
      raise InputError(f"distill.points is {self.num_points}; it is 1 or more")

  def init(self, key: Array) -> dict[str, Any]:
    """Fresh parameters: a nested dict of float32 arrays."""
    return self.network.init(key, jnp.zeros((1, 2, *self.image_hw, 3)))["params"]

  def loss(
    self, params: dict[str, Any], pair: FramePair, keys: Array
  ) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The sequence loss at the points that count.

    Args:
      params: as `init` makes them.
      pair: frames float32 [B, 2, H, W, 3], RGB in [0, 1], with labels or truth as `wants` says.
      keys: typed keys [B]; each draws its pair's points and changes.

    Returns:
      (loss, metrics): metrics hold `loss`, `kept` (share of the points that count), `error` and
      `still_error`: mean distance in pixels of the last estimate, and of no motion, from what is
      told.
    """
    draw, change = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    points, told, counts = self._told(pair, draw)
    frames = pair.frames
    if self.augmentation is not None:
      frames, points, told, inside = jax.vmap(self.augmentation)(change, frames, points, told)
      counts &= inside
    weight = counts.astype(jnp.float32)
    estimates = self.network.apply({"params": params}, frames, every=True)
    read = jax.vmap(jax.vmap(geometry.sample_bilinear), in_axes=(0, None))
    flow_xy = read(estimates.flow_xy, points)
    info = None if estimates.info is None else read(estimates.info, points)
    loss = flow_losses.sequence_loss(
      flow_xy, info, told, weight, kind=self.loss_kind, gamma=self.gamma
    )

    def mean(distance):
      return jnp.sum(distance * weight) / jnp.maximum(jnp.sum(weight), 1.0)

    return loss, {
      "loss": loss,
      "kept": jnp.mean(weight),
      "error": mean(jnp.linalg.norm(flow_xy[-1] - told, axis=-1)),
      "still_error": mean(jnp.linalg.norm(told, axis=-1)),
    }

  def pictures(
    self, params: dict[str, Any], pair: FramePair, keys: Array
  ) -> dict[str, Float[Array, "b h w 3"]]:
    """One strip a pair: frame 1, frame 2, frame 2 drawn back by the flow, and the flow (red to the
    right, green downwards)."""
    flow_xy = self.network.apply({"params": params}, pair.frames).flow_xy
    back = jax.vmap(geometry.warp_backward)(pair.frames[:, 1], flow_xy)
    share = 0.5 + 0.5 * flow_xy / (_LONGEST * min(self.image_hw))
    colour = jnp.concatenate([share, jnp.full_like(share[..., :1], 0.5)], axis=-1)
    strip = jnp.concatenate([pair.frames[:, 0], pair.frames[:, 1], back, colour], axis=2)
    return {"flow": jnp.clip(strip, 0.0, 1.0)}

  def evals(self, params: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """How far `params` lead points of held-out scenes astray; see `held_out_flow`."""
    yield from self.held_out.run(params)

  def _told(
    self, pair: FramePair, keys: Array
  ) -> tuple[Float[Array, "b n 2"], Float[Array, "b n 2"], Bool[Array, "b n"]]:
    """Points, the flow that is told of them, and whether they count."""
    if self.wants == "labels":
      said = pair.labels
      sure = said.confidence >= self.min_confidence
      consistent = said.round_trip <= self.max_round_trip
      return said.points_xy, said.flow_xy, said.visible & sure & consistent

    def draw(key, flow_xy, visible):
      h, w = visible.shape
      place = jax.random.randint(key, (self.num_points,), 0, h * w)
      row, column = place // w, place % w
      points_xy = jnp.stack([column, row], axis=-1) + 0.5
      return points_xy, flow_xy[row, column], visible[row, column]

    return jax.vmap(draw)(keys, pair.flow_xy, pair.visible)


def build(config: Any) -> Distill:
  """Makes the task from the sections `distill`, `flow_network`, `label`, `log` and `data`.

  Raises:
    InputError: settings it cannot work with, or sources that do not say what it wants.
  """
  settings = config.distill
  wants = "labels" if config.task == "distill" else "truth"
  source = "labels" if wants == "labels" else "scenes"
  other = [name for name, s in config.data.sources.items() if s.weight > 0 and name != source]
  if other:
    raise InputError(
      f"the task {config.task} learns from data.sources.{source}; set the weight of "
      f"{', '.join(other)} to 0"
    )
  try:
    network = models.build_flow_network(config.flow_network)
  except (ValueError, TypeError) as error:
    raise InputError(f"config.flow_network cannot be built: {error}") from None
  image_hw = tuple(config.label.image_hw)
  if wants == "labels":
    _check_round_trip_limit(config)
  task = Distill(
    network=network,
    image_hw=image_hw,
    wants=wants,
    loss_kind=settings.loss,
    gamma=settings.gamma,
    augmentation=Augmentation(**settings.augment) if settings.augmented else None,
    min_confidence=config.label.min_confidence,
    max_round_trip=config.label.max_round_trip,
    num_points=settings.points,
    held_out=held_out_flow.build(config, network, image_hw=image_hw),
  )
  if settings.loss == "laplace" and config.flow_network.kind != "sea_raft":
    raise InputError("distill.loss 'laplace' takes what only sea_raft says; choose 'l1'")
  tasks.trace(task.init, jax.random.key(0), what="config.flow_network")
  return task


def _check_round_trip_limit(config: Any) -> None:
  """Raises InputError where the labels to learn from say nothing about a limit of the config's."""
  folder, limit = config.data.sources.labels.paths, config.label.max_round_trip
  # A job without a folder is refused where its data are read.
  if folder and limit != base.get_config().label.max_round_trip:
    source = labels.LabelsSource(folder, image_hw=tuple(config.label.image_hw))
    labels.check_round_trip_limit(limit, asked=source.asked_back)

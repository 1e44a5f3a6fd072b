"""`FlowNetworkTracker`: RAFT or SEA-RAFT with the methods of `Tracker`.

A pair of frames is one pass for all its points: dense flow forward and back, read at the points.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from cwm_jax import geometry, models
from cwm_jax.counterfactual import ahead, pending
from cwm_jax.counterfactual.engine import Frame
from cwm_jax.counterfactual.pending import Passes, Pending
from cwm_jax.tracker import Tracker
from cwm_jax.types import Explanation, FlowEstimate, InputError, PointFlow

PROTOCOLS = ("half_pixel", "release")
OCCLUSIONS = ("absolute", "relative")
SETTINGS = ("protocol", "occlusion", "occlusion_threshold")  # of the constructor


class FlowNetworkTracker(Tracker):
  """Follows points by dense flow from each query's frame to every later one.

  A point is visible where flow forward and then back returns to it. Its confidence is 1/2 at the
  threshold of that, and 1 where it returns exactly.
  """

  def __init__(
    self,
    flow_fn: Callable[[Any], Any],
    *,
    protocol: str = "half_pixel",
    occlusion: str = "absolute",
    occlusion_threshold: float | None = None,
  ):
    """
    Args:
      flow_fn: frames float32 [B, 2, H, W, 3], RGB in [0, 1], of any size -> `FlowEstimate`. As a
        `jax.tree_util.Partial` its parameters are arguments of the compiled programs.
      protocol: "half_pixel": flow is read between pixels, answers are continuous, and what leaves
        the frame is not visible; "release": as Opt-CWM's public release, points are truncated to
        pixels, answers are bare indices, and only forward and back decides what is visible.
      occlusion: "absolute" in pixels, or "relative" to the lengths of both flows, see
        `geometry.round_trip`.
      occlusion_threshold: None takes 6 pixels, or 0.5 when relative.

    Raises:
      InputError: a setting that cannot be.
    """
    # The other constructor lays out counterfactual questions; what is inherited is what lies above.
    self._engine = FlowEngine(
      flow_fn, protocol=protocol, occlusion=occlusion, threshold=occlusion_threshold
    )

  @classmethod
  def of_weights(
    cls,
    params: dict[str, Any],
    config: dict[str, Any],
    *,
    mark: Any = None,
    dtype: str | None = None,
    iterations: Any = None,
    **settings: Any,
  ) -> FlowNetworkTracker:
    """A tracker by what a weights file holds.

    Args:
      params: of the network, nested.
      config: with a "flow_network" section.
      mark: None; a flow network is not asked by marks.
      dtype: compute dtype, "float32" or "bfloat16"; None takes the file's.
      iterations: a whole number; None takes the file's.
      **settings: see the constructor.

    Raises:
      InputError: a mark, a setting that cannot be, or one that only predictors have.
    """
    if mark is not None:
      raise InputError("these are the weights of a flow network, which is not asked by marks")
    for name in settings:
      if name not in SETTINGS:
        known = ", ".join((*SETTINGS, "dtype"))
        raise InputError(f"a flow network has no setting {name!r}; it has {known} and iterations")
    section = dict(config["flow_network"])
    section |= {} if dtype is None else {"dtype": dtype}
    section |= {} if iterations is None else {"iterations": iterations}
    count, least = section["iterations"], 1 if section["kind"] == "raft" else 0
    if not isinstance(count, int | np.integer) or count < least:
      raise InputError(
        f"a flow network cannot be run for {count} iterations; give a whole number, {least} or more"
      )
    try:
      module = models.build_flow_network(section)
    except ValueError as error:  # what the file says was built before
      raise InputError(str(error)) from None
    return cls(Partial(Network(module), jax.tree.map(jnp.asarray, params)), **settings)

  def explain(self, frame1: Any, frame2: Any, point_xy: Any) -> Explanation:
    """Not for flow networks.

    Raises:
      InputError: always.
    """
    raise InputError("a flow network answers without marks and masks; there is nothing to explain")

  def explaining(self, frame1: Any, frame2: Any, point_xy: Any) -> Any:
    """Not for flow networks.

    Raises:
      InputError: always.
    """
    return self.explain(frame1, frame2, point_xy)

  def ask(self, program: Any, frame1: Any, frame2: Any, point_xy: Any, **named: Any) -> Any:
    """Not for flow networks.

    Raises:
      InputError: always.
    """
    raise InputError("a flow network predicts no frames; there is nothing to ask")


@dataclass(frozen=True)
class Network:
  """`module.apply`; equal ones share their compiled programs."""

  module: Any

  def __call__(self, params: Any, frames: Any) -> FlowEstimate:
    return self.module.apply({"params": params}, frames)


class FlowEngine:
  """Dense flow under the questions that `Tracker` asks; see `counterfactual.engine.Engine`."""

  # Both directions of one pair fill a CPU's caches and most of an accelerator.
  pairs_at_once = 1

  def __init__(self, flow_fn: Any, *, protocol: str, occlusion: str, threshold: float | None):
    """See `FlowNetworkTracker`.

    Raises:
      InputError: a setting that cannot be.
    """
    for what, value, choices in (
      ("protocol", protocol, PROTOCOLS),
      ("occlusion", occlusion, OCCLUSIONS),
    ):
      if value not in choices:
        raise InputError(f"the {what} is {value!r}; choose one of {', '.join(choices)}")
    relative = occlusion == "relative"
    if threshold is None:
      threshold = 0.5 if relative else 6.0
    if not threshold > 0:
      raise InputError(f"the occlusion threshold is {threshold}; it is above 0")
    self._flow_fn = flow_fn if isinstance(flow_fn, Partial) else Partial(flow_fn)
    self._release, self._relative = protocol == "release", relative
    self._threshold = float(threshold)
    self.run: Any = ahead.call

  def prepare(self, image: np.ndarray) -> Frame:
    """Puts a frame, uint8 [H, W, 3], on the device as it is."""
    # The caller may write the next frame into the same memory.
    return Frame(jax.device_put(image, may_alias=False), None)

  def ask(
    self,
    pairs: Sequence[tuple[Frame, Frame]],
    pair_of: np.ndarray,
    points_xy: np.ndarray,
    video_hw: tuple[int, int],
  ) -> Pending:
    """Starts the work for some points of some pairs; does not wait for it.

    Args:
      pairs: (frame 1, frame 2), from `prepare`.
      pair_of: int [n], the pair of each point.
      points_xy: float32 [n, 2], continuous (x, y), pixels of the frames.
      video_hw: the frames' size; their own shape says it too.
    """
    return pending.begin(self.parts(pairs, pair_of, points_xy, video_hw), len(points_xy))

  def parts(
    self,
    pairs: Sequence[tuple[Frame, Frame]],
    pair_of: np.ndarray,
    points_xy: np.ndarray,
    video_hw: tuple[int, int],
  ) -> Iterator[tuple[np.ndarray, PointFlow]]:
    """`ask` in parts: (which points, their padded answers on the device)."""
    for number, pair in enumerate(pairs):
      mine = np.flatnonzero(pair_of == number)
      if not mine.size:
        continue
      flow_xy, ratio = self.run(
        _both_ways,
        self._flow_fn,
        [frame.small for frame in pair],
        threshold=self._threshold,
        relative=self._relative,
      )
      # Padded to a power of two, so that few numbers of points have a program of their own.
      size = max(16, 1 << (len(mine) - 1).bit_length())
      asked = np.resize(points_xy[mine], (size, 2)).astype(np.float32)
      yield mine, self.run(_read, flow_xy, ratio, asked, release=self._release)

  def compile_ahead(
    self, video_hw: tuple[int, int], *, points: int | None, pairs: int
  ) -> list[jax.stages.Compiled]:
    """See `Tracker.compile`; "any number" of points is up to 256. Returns the programs."""
    image = jax.ShapeDtypeStruct((*video_hw, 3), np.uint8)
    counts = ahead.counts_to_ask(
      (16, 32, 64, 128, 256), points=points, pairs=pairs, pairs_at_once=self.pairs_at_once
    )
    pair = (Frame(image, None),) * 2
    return ahead.compile_questions(copy.copy(self), pair, video_hw, counts=counts)

  def ask_grid(
    self, pair: tuple[Frame, Frame], points_xy: np.ndarray, video_hw: tuple[int, int], **_: Any
  ) -> PointFlow:
    """Destinations of a grid of points [gy, gx, 2]; a flow network has no marks to share."""
    flat = points_xy.reshape(-1, 2)
    found = self.ask([pair], np.zeros(len(flat), int), flat, video_hw).fetch()
    return PointFlow(*(v.reshape(*points_xy.shape[:2], *v.shape[1:]) for v in found))

  def passes(self) -> Passes:
    """None: a flow network is no predictor."""
    return Passes(0, 0)


@partial(jax.jit, static_argnames=("threshold", "relative"))
def _both_ways(flow_fn: Any, images: Any, *, threshold: float, relative: bool) -> tuple[Any, Any]:
  """Flow [h, w, 2] between two frames uint8 [h, w, 3], and how far it comes back to itself."""
  frames = jnp.stack(images).astype(jnp.float32) / 255.0
  flow_xy, back_xy = flow_fn(jnp.stack([frames, frames[::-1]])).flow_xy
  ratio, _ = geometry.round_trip(flow_xy, back_xy, threshold=threshold, relative=relative)
  return flow_xy, ratio


@partial(jax.jit, static_argnames="release")
def _read(flow_xy: Any, ratio: Any, points_xy: Any, *, release: bool) -> PointFlow:
  h, w = flow_xy.shape[:2]
  index = geometry.point_to_index_yx(points_xy, (h, w))
  row, column = index[:, 0], index[:, 1]
  away = ratio[row, column]
  confidence, visible = 1.0 / (1.0 + away), away <= 1.0
  if release:
    xy = index[:, ::-1].astype(jnp.float32) + flow_xy[row, column]
    return PointFlow(xy, visible, confidence)
  xy = points_xy + geometry.sample_bilinear(flow_xy, points_xy)
  inside = jnp.all((xy >= 0) & (xy <= jnp.array([w, h])), axis=-1)
  return PointFlow(xy, visible & inside, jnp.where(inside, confidence, 0.0))

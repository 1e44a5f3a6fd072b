"""`Tracker`: a predictor, a mark and a way of asking, applied to frames and videos of any size.

What users and evaluators call. It checks what it is given and puts answers together; the work
itself is the engine's (`counterfactual.engine`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cwm_jax import explanations, tracking
from cwm_jax.counterfactual import adaptive, adaptive_engine, compiled, engine, perturb
from cwm_jax.counterfactual.pending import Passes
from cwm_jax.types import Explanation, InputError, PointFlow, Prediction, Tracks


class Tracker:
  """Follows points by asking a predictor counterfactual questions.

  `Tracker.load` takes weights; the constructor takes the parts, which may be a toy of three lines.
  Coordinates are continuous pixels of the frames as given: a pixel's centre is its index + 0.5.
  Under the protocol "release" answers are bare indices instead, as the public release gives them.
  """

  def __init__(
    self,
    predict_fn: Callable[[Any, Any], Prediction],
    *,
    image_hw: tuple[int, int],
    patch: int,
    num_masks: int | str | adaptive.Rule = 10,
    mask_ratio: float = 0.9,
    zoom: int = 0,
    mark: Mapping[str, Any] | perturb.Mark | None = None,
    readout: str = "argmax",
    masks_seed: int = 0,
    memory_budget: float | None = None,
    order: str | None = None,
    average: str | None = None,
    protocol: str = "half_pixel",
    inverse_temperature: float = 200.0,
    occlusion_threshold: float = 0.05,
  ):
    """Puts a tracker together.

    Args:
      predict_fn: (frames [B, 2, h, w, 3] normalised, mask [B, 2, gh, gw]) -> Prediction. As a
        `jax.tree_util.Partial` its parameters are arguments of the compiled programs; what a plain
        function closes over becomes constants.
      image_hw: the size that `predict_fn` sees.
      patch: side of its patches in pixels.
      num_masks: N of MM-N; or "adaptive" or a `counterfactual.adaptive.Rule`: each point chooses
        its masks and stops when its peak is settled (not with zoom or the protocol "release").
      mask_ratio: share of frame 2's patches that is hidden.
      zoom: rounds of multi-scale refinement after the whole frame.
      mark: a mark (see `counterfactual.perturb`), its description as a dict, or None for a red
        square of half a patch.
      readout: "argmax" (a pixel's centre), "soft" or "window" (sub-pixel).
      masks_seed: of the masks; all pairs get the same ones, so an answer depends on its pair alone.
      memory_budget: bytes for the passes in flight; None takes a quarter of the device's memory, or
        1 GiB where that is not told.
      order: of averaging over masks, "release" (signed differences), "paper" (L1 responses) or
        "matched" (the signed differences' part in the mark's own colour). None takes "matched" for
        adaptive masks, "release" for others.
      average: "hidden" (over the masks that hide a pixel) or "release" (over all masks); None takes
        the protocol's: "release" there, else "hidden".
      protocol: of coordinates, "half_pixel" or "release": as the public release of Opt-CWM,
        answers are bare indices, points are truncated to pixels, frames are resized without
        antialias, and differences are resized to the video before they are read out.
      inverse_temperature: of the soft read-out.
      occlusion_threshold: a point counts as visible when its peak response, in normalised units,
        reaches this.

    Raises:
      InputError: a setting that cannot be.
    """
    h, w = image_hw
    if h % patch or w % patch:
      raise InputError(f"an image of {h} x {w} does not divide into patches of {patch} pixels")
    if mark is None:
      mark = perturb.default(patch)
    elif isinstance(mark, Mapping):
      mark = perturb.build(mark)
    rule = adaptive.Rule() if num_masks == "adaptive" else num_masks
    make = engine.Engine
    if isinstance(rule, adaptive.Rule):
      make, num_masks = partial(adaptive_engine.AdaptiveEngine, rule=rule), rule.bank
    elif isinstance(num_masks, str):
      raise InputError(f"num_masks is {num_masks!r}; give a number, or 'adaptive'")
    self._engine = make(
      predict_fn,
      mark,
      compiled.make_masks(
        masks_seed,
        grid_hw=(h // patch, w // patch),
        mask_ratio=mask_ratio,
        num_masks=num_masks,
        zoom=zoom,
      ),
      patch=patch,
      memory_budget=memory_budget,
      settings=dict(
        order=order or ("matched" if isinstance(rule, adaptive.Rule) else "release"),
        average=average or ("release" if protocol == "release" else "hidden"),
        readout=readout,
        inverse_temperature=inverse_temperature,
        occlusion_threshold=occlusion_threshold,
        protocol=protocol,
      ),
    )

  @classmethod
  def load(
    cls,
    name_or_path: str | Path | None = None,
    *,
    num_masks: int | str | adaptive.Rule = 10,
    mask_ratio: float | None = None,
    zoom: int = 0,
    mark: Mapping[str, Any] | perturb.Mark | str | Path | None = None,
    readout: str = "argmax",
    masks_seed: int = 0,
    dtype: str | None = None,
    attention_dtype: str | None = None,
    memory_budget: float | None = None,
    **settings: Any,
  ) -> Tracker:
    """Makes a tracker from a weights file or a public release.

    A flow network's weights make a `flow_tracker.FlowNetworkTracker`, which has settings of its
    own; of these only name_or_path and dtype mean anything to it.

    Args:
      name_or_path: a safetensors file of this project, or a release's name such as "opt-cwm-512" or
        "sea-raft-M", which is fetched and converted once; None takes the weights in the package.
      mask_ratio: None takes what the weights were trained with.
      mark: None takes what the weights file recommends, or a red square where it says nothing; a
        path is a learned mark's file, for this predictor or the same for smaller images.
      dtype: compute dtype, "float32" or "bfloat16"; None takes the file's.
      attention_dtype: that of attention; None takes the file's, whatever `dtype` is. Without
        float32 there, one in fourteen destinations of the weights in the package moves.
      num_masks, zoom, readout, masks_seed, memory_budget, **settings: see the constructor.

    Raises:
      InputError: no such file, or one that is not a weights file, or a setting that cannot be.
    """
    from cwm_jax import loading
    from cwm_jax.pretrained import flow_networks, releases, weights

    path = weights.shipped() if name_or_path is None else releases.locate(name_or_path)
    params, config = weights.load(path)
    weights.check_fit(params, config, where=f"weights file {path}")
    if flow_networks.is_flow_network(config):
      from cwm_jax.flow_tracker import FlowNetworkTracker

      return FlowNetworkTracker.of_weights(params, config, mark=mark, dtype=dtype, **settings)
    chosen = dict(mask_ratio=mask_ratio, mark=mark, dtype=dtype, attention_dtype=attention_dtype)
    parts = loading.predictor(path, params, config, **chosen)
    return cls(
      **parts._asdict(),
      num_masks=num_masks,
      zoom=zoom,
      readout=readout,
      masks_seed=masks_seed,
      memory_budget=memory_budget,
      **settings,
    )

  @property
  def passes(self) -> Passes:
    """Passes of the predictor so far, over whole frames; those of `explain` do not count."""
    return self._engine.passes()

  def track(
    self, video: Iterable[Any], queries_tyx: Any, *, mode: str = "query", sure: float = 0.08
  ) -> Tracks:
    """Follows each query through all frames after its own.

    Args:
      video: uint8 [T, H, W, 3], or any iterable of frames uint8 [H, W, 3], which is consumed once,
        frame by frame; only the frames that points are compared with are kept.
      queries_tyx: [N, 3], (frame index, y, x).
      mode: with which frame each later one is compared: "query": the query's own, so errors do not
        add up; "chain": the one in which the point was last seen; "anchor": both, and the query's
        own is believed where it is visible and `sure`.
      sure: the confidence that the mode "anchor" asks for; with the shipped weights most
        comparisons with a query's frame reach 0.08, and those that do not are mostly wrong.

    Returns:
      Tracks of NumPy arrays, [N, T, ...]. Before the query's frame a point is invisible and lies
      where it was asked for.

    Raises:
      InputError: frames or queries that cannot be used.
    """
    columns = self.track_frames(video, queries_tyx, mode=mode, sure=sure)
    return Tracks(*(np.stack(values, axis=1) for values in zip(*columns)))

  def track_frames(
    self, video: Iterable[Any], queries_tyx: Any, *, mode: str = "query", sure: float = 0.08
  ) -> Iterator[PointFlow]:
    """As `track`, but yields each frame's answers as soon as they are known.

    Yields:
      PointFlow of NumPy arrays, one a frame: xy [N, 2], visible [N], confidence [N].

    Raises:
      InputError: as `track`, when the frame at fault is met.
    """
    start, points = tracking.read_queries(queries_tyx)
    frames = self._frames(video, points)
    return tracking.follow(frames, start, points, mode=mode, ask=self._engine.ask, sure=sure)

  def flow(self, frame1: Any, frame2: Any, points_xy: Any) -> PointFlow:
    """Where points of frame 1 are in frame 2.

    Args:
      frame1, frame2: uint8 [H, W, 3].
      points_xy: [N, 2].

    Returns:
      PointFlow of NumPy arrays; xy are destinations.

    Raises:
      InputError: frames or points that cannot be used.
    """
    answer = self.pairs([(frame1, frame2)], np.asarray(points_xy, np.float32)[None])
    return PointFlow(*(values[0] for values in answer))

  def pairs(self, frames: Iterable[Any], points_xy: Any) -> PointFlow:
    """`flow` for many pairs of one size.

    Args:
      frames: uint8 [P, 2, H, W, 3], or an iterable of pairs.
      points_xy: [P, N, 2].

    Returns:
      PointFlow of NumPy arrays: xy [P, N, 2], visible [P, N], confidence [P, N].

    Raises:
      InputError: frames or points that cannot be used.
    """
    return tracking.ask_pairs(frames, points_xy, read=self._frame, engine=self._engine)

  def compile(
    self, video_hw: tuple[int, int], *, points: int | None = None, pairs: int = 1
  ) -> list[jax.stages.Compiled]:
    """Compiles what `flow`, `pairs` or `track` will run for frames of a size; asks nothing.

    Args:
      video_hw: of the frames to come. Only zoom, "release" and flow networks have programs for each
        size; else any will do.
      points: of each pair; None for any number of them.
      pairs: asked about at a time; of a video, the frames in which queries begin.

    Returns:
      The programs, to be looked at; they need not be kept.

    Raises:
      InputError: a size or a number below 1.
    """
    if min(*video_hw, 1 if points is None else points, pairs) < 1:
      raise InputError(
        f"{pairs} pairs of frames {tuple(video_hw)}, {points} points: 1 or more each"
      )
    return self._engine.compile_ahead(tuple(video_hw), points=points, pairs=pairs)

  def dense_flow(
    self, frame1: Any, frame2: Any, stride: int = 8, *, marks: int = 1, votes: float | None = None
  ) -> tuple[np.ndarray, np.ndarray]:
    """Flow on a grid: the centre of every `stride` x `stride` cell that fits into the frame.

    Args:
      marks, votes: see `flow_grid`; with one mark and no votes it is `flow`.

    Returns:
      flow_xy float32 [h, w, 2], (dx, dy) in pixels, and points_xy [h, w, 2], where it starts.

    Raises:
      InputError: frames, a stride or marks that cannot be used; marks beside zoom or "release".
    """
    points = tracking.grid(tracking.check_image(frame1).shape[:2], stride)
    if marks == 1 and not votes:
      answer = self.flow(frame1, frame2, points.reshape(-1, 2))
      return answer.xy.reshape(points.shape) - points, points
    return self.flow_grid(frame1, frame2, points, marks=marks, votes=votes).xy - points, points

  def flow_grid(
    self, frame1: Any, frame2: Any, points_xy: Any, *, marks: int = 16, votes: float | None = None
  ) -> PointFlow:
    """Where the points of an even grid are in frame 2, several of them marked in each pass.

    Args:
      frame1, frame2: uint8 [H, W, 3].
      points_xy: [gy, gx, 2], row by row, at even steps.
      marks: in one pass, told apart as `counterfactual.many` says, with a pass a mask and point.
      votes: width of neighbours' votes, in patches; None lets none vote on answers to single marks,
        and takes 1 where there are several.

    Returns:
      PointFlow of NumPy arrays: xy [gy, gx, 2], visible [gy, gx] (True: with several marks it
      cannot be told), confidence [gy, gx], of the votes.

    Raises:
      InputError: as `dense_flow`.
    """
    points = tracking.read_grid(points_xy)
    one, video_hw = self._frame(frame1, None)
    two, video_hw = self._frame(frame2, video_hw)
    tracking.check_inside(points.reshape(-1, 2), video_hw)
    votes = float(marks > 1) if votes is None else votes
    return self._engine.ask_grid((one, two), points, video_hw, marks=marks, votes=votes)

  def explain(self, frame1: Any, frame2: Any, point_xy: Any) -> Explanation:
    """One question with everything in between, on the whole frame (zoom's rounds are left out).

    Args:
      frame1, frame2: uint8 [H, W, 3].
      point_xy: [2].

    Returns:
      An Explanation of NumPy arrays, at the predictor's resolution whatever the protocol; the
      answer is that of `flow` without zoom. Predictions are RGB, and frame 2 itself where it is
      revealed.

    Raises:
      InputError: frames or a point that cannot be used.
    """
    (whole,) = self._explaining(frame1, frame2, point_xy, self._engine.masks.shape[1])
    return whole

  def explaining(self, frame1: Any, frame2: Any, point_xy: Any) -> Iterator[Explanation]:
    """`explain`, mask by mask.

    Yields:
      An Explanation after each mask, of the masks so far; the last one is that of `explain`.

    Raises:
      InputError: frames or a point that cannot be used.
    """
    return self._explaining(frame1, frame2, point_xy, 1)

  def ask(
    self, program: Callable[..., Any], frame1: Any, frame2: Any, point_xy: Any, **named: Any
  ) -> Any:
    """Asks a counterfactual of your own, such as `counterfactual.segments.moves_along`.

    Args:
      program: a pure function (predict_fn, frames [2, h, w, 3] normalised, masks [m, 2, gh, gw],
        point_xy, *, patch, **named) at the predictor's resolution; it is compiled.
      frame1, frame2: uint8 [H, W, 3].
      point_xy: [2] or [n, 2], pixels of the frames; the program gets it in the predictor's.
      **named: handed on; anything that can be hashed.

    Returns:
      What the program returns, as NumPy arrays.

    Raises:
      InputError: frames or a point that cannot be used.
    """
    one, video_hw = self._frame(frame1, None)
    two, video_hw = self._frame(frame2, video_hw)
    point = np.asarray(point_xy, np.float32)
    tracking.check_inside(point, video_hw)
    answer = self._engine.ask_program(program, (one, two), point, video_hw, named)
    return jax.tree.map(np.asarray, answer)

  def _explaining(self, frame1, frame2, point_xy, masks_at_once: int) -> Iterator[Explanation]:
    one, video_hw = self._frame(frame1, None)
    two, video_hw = self._frame(frame2, video_hw)
    point = np.asarray(point_xy, np.float32).reshape(-1)
    tracking.check_inside(point, video_hw)
    asked = (self._engine, (one, two), point, video_hw)
    return explanations.growing(*asked, masks_at_once=masks_at_once)

  def _frames(
    self, video: Iterable[Any], points_xy: np.ndarray
  ) -> Iterator[tuple[engine.Frame, tuple[int, int]]]:
    """The frames of a video on the device; the points are looked at when its size is known."""
    video_hw = None
    for image in video:
      frame, size_hw = self._frame(image, video_hw)
      if video_hw is None:
        tracking.check_inside(points_xy, size_hw)
        video_hw = size_hw
      yield frame, video_hw

  def _frame(self, image: Any, video_hw: Any) -> tuple[engine.Frame, tuple[int, int]]:
    """A frame on the device, and its size, which must be that of the frames before it."""
    image = tracking.check_image(image)
    if video_hw not in (None, image.shape[:2]):
      raise InputError(f"a frame is {image.shape[:2]} in size, the ones before it are {video_hw}")
    return self._engine.prepare(image), image.shape[:2]

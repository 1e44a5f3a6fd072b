"""Trackers to compare with, all with the methods of `cwm_jax.tracker.Tracker`.

Zero motion and global phase correlation need NumPy only; DIS, Farneback and Lucas-Kanade are
OpenCV's (extra `baselines`). Whatever has `.track`, `.flow` and `.pairs` can be evaluated.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from cwm_jax.types import InputError, PointFlow, Tracks


class PairTracker:
  """A tracker made of a function of two frames; subclasses give `flow`.

  Attributes:
    chain: False compares every frame with the query's, as the counterfactual tracker does; True
      goes from frame to frame, which suits methods for small motion.
  """

  def __init__(self, *, chain: bool = False):
    self.chain = chain

  def flow(self, frame1: Any, frame2: Any, points_xy: Any) -> PointFlow:
    """As `Tracker.flow`: frames uint8 [H, W, 3], points [N, 2]; xy are destinations, pixels."""
    raise NotImplementedError

  def pairs(self, frames: Iterable[Any], points_xy: Any) -> PointFlow:
    """As `Tracker.pairs`: frames uint8 [P, 2, H, W, 3], points [P, N, 2]."""
    answers = [self.flow(*pair, points) for pair, points in zip(frames, points_xy)]
    return PointFlow(*(np.stack(values) for values in zip(*answers)))

  def track(self, video: Iterable[Any], queries_tyx: Any, *, mode: str = "query") -> Tracks:
    """As `Tracker.track`: frames uint8 [H, W, 3], queries [N, 3]."""
    if mode != "query":
      raise InputError(f"the mode is {mode!r}; this tracker knows 'query'")
    queries = np.asarray(queries_tyx, np.float32)
    start, points = queries[:, 0].astype(int), queries[:, :0:-1].copy()
    kept: dict[int, Any] = {}
    columns = []
    for t, frame in enumerate(video):
      column = PointFlow(points.copy(), start == t, (start == t).astype(np.float32))
      for source in sorted(kept):
        # A chain moves every point that has begun; otherwise each query frame moves its own.
        mine = np.flatnonzero(start < t if self.chain else start == source)
        before = columns[-1].xy[mine] if self.chain else points[mine]
        for to, answer in zip(column, self.flow(kept[source], frame, before)):
          to[mine] = answer
      if self.chain:
        kept = {t: frame} if (start <= t).any() else {}
      elif t in start:
        kept[t] = frame
      columns.append(column)
    if not columns:
      raise InputError("the video has no frames")
    return Tracks(*(np.stack(values, axis=1) for values in zip(*columns)))


class AtPixelCentres:
  """A tracker of the protocol "release", its bare indices moved to the centres of their pixels.

  Whatever evaluates trackers takes their answers for continuous places.
  """

  def __init__(self, tracker: Any):
    self._tracker = tracker

  def track(self, video: Iterable[Any], queries_tyx: Any) -> Tracks:
    """As `Tracker.track`: frames uint8 [H, W, 3], queries [N, 3]."""
    tracks = self._tracker.track(video, queries_tyx)
    # Up to a query's own frame the place is the query itself.
    later = np.arange(tracks.xy.shape[1]) > np.asarray(queries_tyx)[:, :1]
    return tracks._replace(xy=tracks.xy + np.float32(0.5) * later[..., None])

  def flow(self, frame1: Any, frame2: Any, points_xy: Any) -> PointFlow:
    """As `Tracker.flow`: frames uint8 [H, W, 3], points [N, 2]."""
    return _half_a_pixel_on(self._tracker.flow(frame1, frame2, points_xy))

  def pairs(self, frames: Iterable[Any], points_xy: Any) -> PointFlow:
    """As `Tracker.pairs`: frames uint8 [P, 2, H, W, 3], points [P, N, 2]."""
    return _half_a_pixel_on(self._tracker.pairs(frames, points_xy))

  def ask(self, program: Any, frame1: Any, frame2: Any, point_xy: Any, **named: Any) -> Any:
    """As `Tracker.ask`, whose answers are the program's own."""
    return self._tracker.ask(program, frame1, frame2, point_xy, **named)


class ZeroMotion(PairTracker):
  """Says that nothing moves."""

  def flow(self, frame1: Any, frame2: Any, points_xy: Any) -> PointFlow:
    return _answer(np.asarray(points_xy, np.float32), np.shape(frame1))


class PhaseCorrelation(PairTracker):
  """One translation for the whole frame, from the phase of the cross-power spectrum, sub-pixel."""

  def flow(self, frame1: Any, frame2: Any, points_xy: Any) -> PointFlow:
    moved = np.asarray(points_xy, np.float32) + self.shift_xy(frame1, frame2)
    return _answer(moved.astype(np.float32), np.shape(frame1))

  def shift_xy(self, frame1: Any, frame2: Any) -> np.ndarray:
    """The translation (dx, dy), pixels, from frame 1 to frame 2, uint8 [H, W, 3]."""
    one, two = (np.asarray(frame, np.float64).mean(axis=-1) for frame in (frame1, frame2))
    h, w = one.shape
    # The taper takes out the jump between opposite borders, which would say "no motion".
    taper = np.hanning(h + 2)[1:-1, None] * np.hanning(w + 2)[None, 1:-1]
    spectra = [np.fft.rfft2((image - image.mean()) * taper) for image in (one, two)]
    cross = spectra[1] * np.conj(spectra[0])
    surface = np.fft.irfft2(cross / np.maximum(np.abs(cross), 1e-9), s=(h, w))
    row, col = np.unravel_index(np.argmax(surface), surface.shape)
    # Sub-pixel: the centroid of what is positive in 5 x 5 round the peak.
    near = np.arange(-2, 3)
    window = np.maximum(surface[np.ix_((row + near) % h, (col + near) % w)], 0.0)
    total = window.sum() or 1.0
    dy = row + (window.sum(axis=1) @ near) / total
    dx = col + (window.sum(axis=0) @ near) / total
    return np.array([dx - w if dx > w / 2 else dx, dy - h if dy > h / 2 else dy])


class DenseFlow(PairTracker):
  """OpenCV's dense flow, read at the points.

  Args:
    method: "dis" or "farneback".
    chain: see `PairTracker`.

  Raises:
    InputError: OpenCV is not installed, or an unknown method.
  """

  def __init__(self, method: str, *, chain: bool = False):
    super().__init__(chain=chain)
    self._cv2 = _import_opencv()
    if method == "dis":
      dis = self._cv2.DISOpticalFlow_create(self._cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
      self._dense = lambda one, two: dis.calc(one, two, None)
    elif method == "farneback":
      self._dense = lambda one, two: self._cv2.calcOpticalFlowFarneback(
        one, two, None, pyr_scale=0.5, levels=5, winsize=15, iterations=3, poly_n=5,
        poly_sigma=1.1, flags=0,
      )  # fmt: skip
    else:
      raise InputError(f"the dense flow method is {method!r}; choose dis or farneback")

  def flow(self, frame1: Any, frame2: Any, points_xy: Any) -> PointFlow:
    points = np.asarray(points_xy, np.float32)
    flow_xy = self._dense(*(_grey(self._cv2, frame) for frame in (frame1, frame2)))
    # OpenCV counts from the first pixel's centre.
    where = (points - 0.5).reshape(-1, 1, 2)
    read = self._cv2.remap(
      flow_xy, where, None, self._cv2.INTER_LINEAR, borderMode=self._cv2.BORDER_REPLICATE
    )
    return _answer(points + read.reshape(-1, 2), np.shape(frame1))


class LucasKanade(PairTracker):
  """OpenCV's pyramidal Lucas-Kanade; a point that it loses counts as occluded and stays in place.

  Raises:
    InputError: OpenCV is not installed.
  """

  def __init__(self, *, chain: bool = False):
    super().__init__(chain=chain)
    self._cv2 = _import_opencv()

  def flow(self, frame1: Any, frame2: Any, points_xy: Any) -> PointFlow:
    points = np.asarray(points_xy, np.float32)
    if not len(points):
      return _answer(points, np.shape(frame1))
    moved, found, _ = self._cv2.calcOpticalFlowPyrLK(
      *(_grey(self._cv2, frame) for frame in (frame1, frame2)),
      np.ascontiguousarray(points - 0.5).reshape(-1, 1, 2),
      None,
      winSize=(21, 21),
      maxLevel=4,
    )
    found = found.reshape(-1).astype(bool)
    xy = np.where(found[:, None], moved.reshape(-1, 2) + 0.5, points)
    answer = _answer(xy, np.shape(frame1))
    seen = answer.visible & found
    return PointFlow(answer.xy, seen, seen.astype(np.float32))


BASELINES = {
  "zero": ZeroMotion,
  "phase": PhaseCorrelation,
  "dis": lambda: DenseFlow("dis"),
  "farneback": lambda: DenseFlow("farneback"),
  "lk": LucasKanade,
  "dis_chain": lambda: DenseFlow("dis", chain=True),
  "farneback_chain": lambda: DenseFlow("farneback", chain=True),
  "lk_chain": lambda: LucasKanade(chain=True),
}


def build(name: str) -> PairTracker:
  """A tracker by its name in `BASELINES`.

  Raises:
    InputError: an unknown name, or one that needs OpenCV where that is not installed.
  """
  if name not in BASELINES:
    raise InputError(f"there is no baseline {name!r}; choose one of {', '.join(BASELINES)}")
  return BASELINES[name]()


def _half_a_pixel_on(answer: PointFlow) -> PointFlow:
  return answer._replace(xy=answer.xy + np.float32(0.5))


def _answer(xy: np.ndarray, shape: tuple[int, ...]) -> PointFlow:
  """Visible as long as the destination lies in the frame."""
  h, w = shape[:2]
  inside = ((xy >= 0) & (xy <= (w, h))).all(axis=-1)
  return PointFlow(xy, inside, inside.astype(np.float32))


def _grey(cv2: Any, frame: Any) -> np.ndarray:
  return cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY)


def _import_opencv() -> Any:
  try:
    import cv2
  except ImportError as error:
    raise InputError(
      "DIS, Farneback and Lucas-Kanade need OpenCV: pip install 'cwm-jax[baselines]'"
    ) from error
  return cv2

"""What the page is told about a point, as a stream of small dicts that JSON can hold."""

from __future__ import annotations

import base64
import contextlib
import io
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from cwm_jax import tracking
from cwm_jax.counterfactual import segments
from cwm_jax.types import Explanation, InputError
from cwm_jax.viewer.footage import Footage

_PNG_UP_TO = 160  # pixels a side of the predictor's image; above it pictures travel as JPEG

Event = dict[str, Any]


class Answers:
  """Asks a tracker on behalf of the page; one question computes at a time.

  Several may be under way: they take turns, mask by mask and frame by frame. Tracks wait while
  something is explained, which is short and is being looked at.
  """

  def __init__(self, footage: Footage, tracker: Any):
    self._footage, self._tracker = footage, tracker
    self._turn = threading.Condition()
    self._explaining = 0

  def clip(self) -> Event:
    """What the page needs to know before anything is asked."""
    clip = self._footage
    h, w = clip.size_hw
    return {
      "name": clip.name,
      "frames": len(clip.frames),
      "first": clip.first,
      "height": h,
      "width": w,
      "fps": clip.fps,
      "modes": list(tracking.MODES),
      "truth": clip.truth is not None,
    }

  def frame(self, t: int) -> bytes:
    """A frame as JPEG. Raises InputError where there is none of that number."""
    self._check_frame(t)
    return _encoded(self._footage.frames[t], "JPEG")

  def explain(self, t1: int, t2: int, point_xy: tuple[float, float]) -> Iterator[Event]:
    """The whole story of one question, one event a mask.

    Args:
      t1, t2: frames 1 and 2.
      point_xy: in frame 1, pixels of the clip as given.

    Yields:
      "marked" and "mark" (pictures; the mark stretched to full contrast) with the first mask; with
      each one "clean", "counterfact" (pictures), "hidden" (rows of 0 and 1), "response" and "mean"
      (heat maps), and the answer so far, "to_xy", "visible". Pictures are data URLs.

    Raises:
      InputError: no such frame, or a point outside it.
    """
    point = self._checked(t1, point_xy)
    self._check_frame(t2)
    frames = self._footage.frames
    stories = self._tracker.explaining(frames[t1], frames[t2], self._footage.to_frames(point))
    with self._turn:
      self._explaining += 1
    try:
      for number, story in enumerate(self._by_turns(stories)):
        event = {"mask": number} | self._of_mask(story)
        yield event | (_of_mark(story) if number == 0 else {})
    finally:
      with self._turn:
        self._explaining -= 1
        self._turn.notify_all()

  def track(self, t: int, point_xy: tuple[float, float], mode: str) -> Iterator[Event]:
    """Where a point of frame `t` is in every other frame.

    In the mode "query" every eighth frame comes first, then every fourth, and so on, so that the
    whole track soon shows; else frame by frame, later ones first.

    Yields:
      {"t", "xy", "visible", "confidence"}, xy in pixels of the clip; before them, where the truth
      is known, {"truth_xy": [[x, y] or None where hidden, ...]}, one a frame.

    Raises:
      InputError: no such frame or mode, or a point outside.
    """
    point = self._checked(t, point_xy)
    if mode not in tracking.MODES:
      raise InputError(f"the mode is {mode!r}; choose one of {', '.join(tracking.MODES)}")
    if self._footage.truth is not None:
      true = self._footage.truth(t, point[None])
      seen = zip(true.xy[0].tolist(), true.visible[0].tolist())
      yield {"truth_xy": [xy if visible else None for xy, visible in seen]}
    yield {"t": t, "xy": point.tolist(), "visible": True, "confidence": 1.0}
    x, y = self._footage.to_frames(point).tolist()
    frames = self._footage.frames
    for order in _orders(t, len(frames), mode):
      columns = self._tracker.track_frames((frames[i] for i in order), [[0, y, x]], mode=mode)
      for i, column in zip(order, self._by_turns(columns, patient=True)):
        if i != t:
          yield {
            "t": i,
            "xy": self._footage.to_clip(column.xy[0]).tolist(),
            "visible": bool(column.visible[0]),
            "confidence": round(float(column.confidence[0]), 4),
          }

  def segment(self, t: int, point_xy: tuple[float, float]) -> Event:
    """What moves along when the point's patch of frame `t` is moved: {"along": heat map}.

    Raises:
      InputError: no such frame, or a point outside it.
    """
    point = self._footage.to_frames(self._checked(t, point_xy))
    frame = self._footage.frames[t]
    with self._turn:
      along = self._tracker.ask(segments.moves_along, frame, frame, point)
    return {"along": _heat(np.maximum(along, 0.0))}

  def warm_up(self) -> float:
    """Has everything compiled before the first click; returns the seconds that took."""
    start = time.perf_counter()
    h, w = self._footage.size_hw
    middle = (w / 2, h / 2)
    with contextlib.suppress(InputError):  # a flow network has nothing to explain
      for _ in self.explain(0, 1, middle):
        break
    for event in self.track(0, middle, "query"):
      if event.get("t", 0) > 0:
        break
    return time.perf_counter() - start

  def _by_turns(self, steps: Iterator[Any], *, patient: bool = False) -> Iterator[Any]:
    while True:
      with self._turn:
        if patient:
          self._turn.wait_for(lambda: not self._explaining)
        step = next(steps, None)
      if step is None:
        return
      yield step

  def _checked(self, t: int, point_xy: tuple[float, float]) -> np.ndarray:
    self._check_frame(t)
    h, w = self._footage.size_hw
    x, y = point_xy
    if not (0 <= x <= w and 0 <= y <= h):
      raise InputError(f"the point (x={x:g}, y={y:g}) lies outside the {w} x {h} frames")
    return np.array([x, y], np.float32)

  def _check_frame(self, t: int) -> None:
    if not 0 <= t < len(self._footage.frames):
      raise InputError(f"there is no frame {t}; they are 0 to {len(self._footage.frames) - 1}")

  def _of_mask(self, story: Explanation) -> Event:
    """The newest mask's part of a story, and the answer so far."""
    return {
      "hidden": ["".join("01"[bit] for bit in row) for row in story.masks[-1].astype(int)],
      "clean": _picture(story.clean[-1]),
      "counterfact": _picture(story.counterfact[-1]),
      "response": _heat(story.responses[-1]),
      "mean": _heat(story.mean),
      "to_xy": self._footage.to_clip(story.to_xy).tolist(),
      "visible": bool(story.visible),
    }


def _orders(t: int, count: int, mode: str) -> list[list[int]]:
  """The orders in which frames are asked about; each begins with the clicked frame `t`."""
  if mode != "query":
    return [list(range(t, count)), list(range(t, -1, -1))]
  others = [i for i in range(count) if i != t]
  coarse = [max(s for s in (8, 4, 2, 1) if (i - t) % s == 0) for i in range(count)]
  return [[t, *sorted(others, key=lambda i: (-coarse[i], abs(i - t)))]]


def _of_mark(story: Explanation) -> Event:
  stretched = story.mark / max(float(np.abs(story.mark).max()), 1e-6)
  return {"marked": _picture(story.marked), "mark": _picture(0.5 + 0.5 * stretched)}


def _picture(image: np.ndarray) -> str:
  """Float RGB [h, w, 3] in [0, 1] as a data URL."""
  small = max(image.shape[:2]) <= _PNG_UP_TO
  kind = "PNG" if small else "JPEG"
  data = _encoded(np.round(np.clip(image, 0, 1) * 255).astype(np.uint8), kind)
  return f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}"


def _heat(heat: np.ndarray) -> Event:
  """A heat map [h, w] as bytes from 0 to its highest value, "top"."""
  top = float(heat.max())
  values = np.round(heat / max(top, 1e-12) * 255).astype(np.uint8)
  data = base64.b64encode(values.tobytes()).decode()
  return {"height": heat.shape[0], "width": heat.shape[1], "top": top, "values": data}


def _encoded(image: np.ndarray, kind: str) -> bytes:
  file = io.BytesIO()
  Image.fromarray(image).save(file, kind, **({"quality": 90} if kind == "JPEG" else {}))
  return file.getvalue()

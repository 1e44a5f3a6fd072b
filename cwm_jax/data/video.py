"""Video files: seek, decode, turn upright. Called by the video source and by the command line.

Times are seconds from the stream's start, taken from presentation time stamps, so they are right
under a variable frame rate. Frames are RGB uint8 [H, W, 3], turned as the file's display matrix
says.
Pixels are those that are stored: a sample aspect ratio other than 1 is not applied.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from typing import NamedTuple

import av
import numpy as np
from absl import logging
from jaxtyping import UInt8

from cwm_jax.data.images import MAX_PIXELS, check_not_url, shown
from cwm_jax.data.orientation import display_matrix, turned, upright
from cwm_jax.types import InputError

VIDEO_SUFFIXES = frozenset(
  ".mp4 .m4v .mov .mkv .webm .avi .gif .mpg .mpeg .ts .mts .m2ts .wmv .flv .ogv .3gp .y4m".split()
)

_RATE = 25.0  # frames a second, of files that do not tell

# Half of the finest time base in use (90 kHz): times closer than this are the same instant.
_SAME_INSTANT_S = 5e-6
_LEAST_S = 1e-3  # between two frames, also where a file tells one time twice


class VideoInfo(NamedTuple):
  """What a video file says of itself.

  path: as given. width, height: pixels of an upright frame. duration_s: seconds. fps: mean frame
  rate, 0 where unknown. codec: FFmpeg's name.
  """

  path: str
  width: int
  height: int
  duration_s: float
  fps: float
  codec: str


class VideoPair(NamedTuple):
  """Two frames of a video: frames uint8 [2, H, W, 3], times_s (of the first, of the second)."""

  frames: np.ndarray
  times_s: tuple[float, float]


class _Timed(NamedTuple):
  time_s: float
  frame: av.VideoFrame


class VideoFile:
  """An open video; use as a context manager. Frames are decoded only when asked for.

  Args:
    path: a local file.
    thread_type: FFmpeg's decoder threads: "NONE" and "SLICE" answer a seek soonest, "FRAME" and
      "AUTO" decode a whole video fastest.
    thread_count: decoder threads; 0 lets FFmpeg choose.

  Raises:
    InputError: missing, a folder, a URL, not a video, without a video stream, or too large.
  """

  def __init__(
    self, path: str | os.PathLike[str], *, thread_type: str = "SLICE", thread_count: int = 0
  ):
    self.path = os.fspath(path)
    self._name = shown(path)
    self._thread_type, self._thread_count = thread_type, thread_count
    _check_local_file(self.path)
    self._container = self._stream = self._scanned_s = None
    self._left_out = 0
    with self._sentences():
      self._open()

  def __enter__(self) -> VideoFile:
    return self

  def __exit__(self, *exc_info: object) -> None:
    self.close()

  def close(self) -> None:
    if self._container is not None:
      self._container.close()

  def info(self) -> VideoInfo:
    """Describes the video; decodes its first frame, since only frames know their orientation.

    Raises:
      InputError: no frame can be decoded.
    """
    with self._sentences():
      image = upright(self._displayed_at(0.0)[0].frame)
      height, width = image.shape[:2]
      fps = self._rate()
      codec = self._stream.codec_context.name
      return VideoInfo(self.path, width, height, self.duration_s(), fps, codec)

  def duration_s(self) -> float:
    """Seconds from the first frame's time to the end of the last one's, as the file claims."""
    with self._sentences():
      stream, container = self._stream, self._container
      if stream.duration:
        return float(stream.duration * stream.time_base)
      if container.duration:
        return container.duration / av.time_base
      # Nothing claimed: look at every packet, which costs reading but no decoding.
      if self._scanned_s is None:
        self._reopen()
        base, rate = self._stream.time_base, self._rate()
        packets = [(p.pts, p.duration or 0) for p in self._container.demux(self._stream) if p.size]
        ends = [pts + lasts for pts, lasts in packets if pts is not None]
        if not (ends or (packets and rate)):
          raise InputError(f"{self._name} holds no video frames")
        # Raw streams carry no times: count packets.
        self._scanned_s = float(max(ends) * base) - self._start_s() if ends else len(packets) / rate
        self._reopen()  # nothing of a closed container may be touched: its memory is gone
      return self._scanned_s

  def latest_start_s(self, gap_s: float) -> float:
    """The latest time at which a pair `gap_s` apart can begin, as the file claims.

    Raises:
      InputError: the video is too short for the gap.
    """
    duration, rate = self.duration_s(), self._rate()
    latest = duration - gap_s - (1 / rate if rate else 0.0)
    # Frames are taken to the nearest one, so half a frame may be missing.
    if latest < (-0.5 / rate if rate else 0.0):
      raise InputError(
        f"{self._name} is too short: it lasts {duration:.3g} s, "
        f"a pair {gap_s:.3g} s apart is wanted"
      )
    return max(0.0, latest)

  def frame_at(self, time_s: float) -> UInt8[np.ndarray, "h w 3"]:
    """The frame on display at a time: the last one that is not later.

    Raises:
      InputError: the video ends before, or is damaged.
    """
    with self._sentences():
      return upright(self._displayed_at(time_s)[0].frame)

  def pair(self, start_s: float, gap_s: float) -> VideoPair:
    """The frame on display at `start_s`, and the one nearest to its own time + `gap_s`.

    Where frames are further apart than the gap, the second is the next frame.

    Raises:
      InputError: the video ends before the second frame, or is damaged.
    """
    with self._sentences():
      first, later = self._displayed_at(start_s)
      target = first.time_s + gap_s
      second = previous = None
      for timed in later:
        if timed.time_s >= target - _SAME_INSTANT_S:
          # Of two that are equally near the earlier, whatever the rounding.
          reach = timed.time_s - target + _SAME_INSTANT_S
          closer = previous and target - previous.time_s <= reach
          second = previous if closer else timed
          break
        previous = timed
      if second is None:
        rate = self._rate()
        if previous is None or target - previous.time_s > (1 / rate if rate else 0.5 * gap_s):
          raise InputError(
            f"{self._name} ends before {target:.3f} s, where the second frame of a pair should be"
          )
        second = previous
      images = [upright(timed.frame) for timed in (first, second)]
      if images[0].shape != images[1].shape:
        raise InputError(f"{self._name} changes its frame size at {second.time_s:.3f} s")
      return VideoPair(np.stack(images), (first.time_s, second.time_s))

  def frames(
    self, *, start_s: float = 0.0, stop_s: float | None = None
  ) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """Every frame from the one on display at `start_s` up to, not including, `stop_s`.

    Holds one frame at a time. Frames that the decoder marks as damaged are left out, named once.

    Raises:
      InputError: decoding fails (after the frames that came before), or the frame size changes.
    """
    return (frame for _, frame in self.timed(start_s=start_s, stop_s=stop_s))

  def timed(
    self, *, start_s: float = 0.0, stop_s: float | None = None
  ) -> Iterator[tuple[float, UInt8[np.ndarray, "h w 3"]]]:
    """As `frames`, each frame with the time in seconds at which it comes on display.

    All are turned as the first one says. Times ascend: where those of the file step back, as in
    streams that were joined, they go on one frame after the last one.
    """
    count, shape, time_s = 0, None, 0.0
    matrix, ahead_s = None, 0.0
    with self._sentences(lambda: f" after {count} frames, at {time_s:.3f} s"):
      first, later = self._displayed_at(start_s)
      self._left_out = 0
      for stored_s, frame in itertools.chain([first], later):
        shown_s, period = stored_s + ahead_s, 1 / (self._rate() or _RATE)
        if count and shown_s <= time_s - 2 * period:
          # Another stream begins. Less is a time that is told twice, or out of order.
          ahead_s = time_s + period - stored_s
          shown_s = time_s + period
        time_s = max(shown_s, time_s + _LEAST_S) if count else shown_s
        if stop_s is not None and time_s >= stop_s - _SAME_INSTANT_S:
          return
        matrix = display_matrix(frame) if count == 0 else matrix
        image = turned(frame, matrix)
        shape = shape or image.shape
        if image.shape != shape:
          raise InputError(f"{self._name} changes its frame size at {time_s:.3f} s")
        yield time_s, image
        count += 1
    if self._left_out:
      logging.warning("%s has %d damaged frames, left out", self._name, self._left_out)
    claimed, period = self.duration_s(), 1 / (self._rate() or 1.0)
    if claimed - time_s > max(2 * period, 0.1 * claimed):
      logging.warning(
        "%s ends at %.2f s although it claims to last %.2f s; it may be cut off",
        self._name,
        time_s,
        claimed,
      )

  def _open(self) -> None:
    # "file" keeps play lists and the like from reaching out to the network.
    self._container = av.open(
      os.path.abspath(self.path),
      metadata_errors="replace",
      options={"protocol_whitelist": "file"},
    )
    # A cover picture inside an audio file is a video stream by name only.
    streams = [
      stream
      for stream in self._container.streams.video
      if not stream.disposition & av.stream.Disposition.attached_pic
    ]
    if not streams or self._container.format.name == "tty":
      self._container.close()
      raise InputError(f"{self._name} has no video stream")
    self._stream = streams[0]
    context = self._stream.codec_context
    if context is None:
      raise InputError(f"{self._name} is in a video format that cannot be decoded")
    if context.width * context.height > MAX_PIXELS:
      raise InputError(f"{self._name} claims {context.width}x{context.height} pixels: too large")
    self._stream.thread_type = self._thread_type
    context.thread_count = self._thread_count
    self._fresh = True

  def _reopen(self) -> None:
    self._container.close()
    self._open()

  def _rate(self) -> float:
    return float(self._stream.average_rate or self._stream.guessed_rate or 0)

  def _margin_s(self) -> float:
    return max(0.25, 3 / self._rate()) if self._rate() else 1.0

  def _start_s(self) -> float:
    return float((self._stream.start_time or 0) * self._stream.time_base)

  def _displayed_at(self, time_s: float) -> tuple[_Timed, Iterator[_Timed]]:
    """The frame on display at a time, and those after it."""
    # On the way there, frames that no other leans on need no decoding. Should the one that is found
    # be as old as those left out, one of them might have been the right one.
    skip_before = time_s - self._margin_s()
    first, later = self._find(time_s, skip_before)
    return (first, later) if first.time_s >= skip_before else self._find(time_s, None)

  def _find(self, time_s: float, skip_before: float | None) -> tuple[_Timed, Iterator[_Timed]]:
    back = 0.0
    while True:
      frames = self._decode_from(time_s - back, skip_before)
      first = next(frames, None)
      if first and first.time_s <= time_s + _SAME_INSTANT_S:
        break
      if time_s - back <= 0:  # this was the whole video
        if first is None:
          raise InputError(f"{self._name} holds no frames that can be decoded")
        break
      # Seeks go by decoding time and indices may be coarse: begin earlier.
      back = 2 * back + 1.0
    for timed in frames:
      if timed.time_s > time_s + _SAME_INSTANT_S:
        return first, itertools.chain([timed], frames)
      first = timed
    rate = self._rate()
    if time_s > first.time_s + (1 / rate if rate else 0.0) + 1e-3 and time_s > self.duration_s():
      raise InputError(f"{self._name} ends at {first.time_s:.3f} s, before {time_s:.3f} s")
    return first, iter(())

  def _decode_from(self, time_s: float, skip_before: float | None) -> Iterator[_Timed]:
    """Frames from the nearest keyframe at or before a time, as near as the format allows."""
    if not self._fresh:  # what was decoded before must not leak into what follows
      self._reopen()
    sought = bool(time_s > 0)
    if sought:
      pts = round((time_s + self._start_s()) / self._stream.time_base)
      try:
        self._container.seek(pts, stream=self._stream, backward=True)
      except (av.FFmpegError, OSError):
        self._reopen()  # no seeking in this format: decode from the beginning
        sought = False
    self._fresh = False
    return self._decode(skip_before, sought)

  def _decode(self, skip_before: float | None, sought: bool) -> Iterator[_Timed]:
    start, base, rate = self._start_s(), self._stream.time_base, self._rate()
    # AVI stores no presentation times, and those made up for B-frames go back and forth.
    avi = self._container.format.name == "avi"
    time_s = -1.0
    for packet in self._container.demux(self._stream):
      # Read from its beginning nothing is left out: of joined streams the later may have the
      # earlier times.
      early = packet.pts is not None and (skip_before or 0) > 0 and not avi
      early = early and float(packet.pts * base) - start < skip_before
      self._stream.codec_context.skip_frame = "NONREF" if early else "DEFAULT"
      for frame in packet.decode():
        if frame.is_corrupt:
          # Some files call frames keyframes that are none: all that follows would be wrong.
          if sought and frame.key_frame:
            return
          self._left_out += 1
          continue
        sought = False
        ticks = frame.dts if avi else frame.pts
        if ticks is not None:
          time_s = float(ticks * base) - start
        else:  # raw streams carry no times: count frames
          time_s = time_s + 1 / rate if time_s >= 0 and rate else 0.0
        yield _Timed(time_s, frame)

  @contextlib.contextmanager
  def _sentences(self, where=lambda: ""):
    """Turns what FFmpeg raises into one sentence that names the file."""
    try:
      yield
    except (av.FFmpegError, OSError, EOFError, MemoryError) as error:
      reason = getattr(error, "strerror", None) or type(error).__name__
      raise InputError(f"{self._name} cannot be read as a video{where()}: {reason}") from error


def probe(path: str | os.PathLike[str]) -> VideoInfo:
  """Size, duration, frame rate and codec of a video. Raises InputError as `VideoFile` does."""
  with VideoFile(path) as video:
    return video.info()


def read_frame(path: str | os.PathLike[str], time_s: float) -> UInt8[np.ndarray, "h w 3"]:
  """The frame on display at a time. Raises InputError as `VideoFile.frame_at` does."""
  with VideoFile(path) as video:
    return video.frame_at(time_s)


def read_pair(path: str | os.PathLike[str], start_s: float, gap_s: float) -> VideoPair:
  """Two frames a time apart. Raises InputError as `VideoFile.pair` does."""
  with VideoFile(path) as video:
    return video.pair(start_s, gap_s)


def iter_frames(
  path: str | os.PathLike[str], *, start_s: float = 0.0, stop_s: float | None = None
) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
  """Every frame of a video, one at a time. Raises InputError as `VideoFile.frames` does."""
  with VideoFile(path, thread_type="AUTO") as video:
    yield from video.frames(start_s=start_s, stop_s=stop_s)


def _check_local_file(path: str) -> None:
  name = shown(path)
  check_not_url(path)
  if not os.path.exists(path):
    raise InputError(f"{name} does not exist")
  if os.path.isdir(path):
    raise InputError(f"{name} is a folder; a video file is needed")
  if not os.path.isfile(path):  # reading a pipe or a device could wait for ever
    raise InputError(f"{name} is not a regular file; a video file is needed")
  if os.path.getsize(path) == 0:
    raise InputError(f"{name} is empty")

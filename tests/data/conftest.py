"""Small videos for the tests of data: frame i is a grey of level 8 * i with a red corner."""

from __future__ import annotations

import signal
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

STEP = 8  # grey levels between frames: more than any codec here loses


def picture(number: int, size_hw: tuple[int, int] = (48, 64)) -> np.ndarray:
  """Frame `number`: grey STEP * number, its top left eighth red."""
  image = np.full((*size_hw, 3), STEP * number, np.uint8)
  image[: size_hw[0] // 4, : size_hw[1] // 2] = (255, 0, 0)
  return image


def number_of(frame: np.ndarray) -> int:
  """Which frame this is, read from the grey at its centre."""
  h, w = frame.shape[:2]
  return round(float(frame[h // 2 - 2 : h // 2 + 2, w // 2 - 2 : w // 2 + 2].mean()) / STEP)


def write_video(
  path: Path,
  count: int = 30,
  *,
  codec: str = "libx264",
  rate: int = 30,
  times_ms: list[int] | None = None,
  size_hw: tuple[int, int] = (48, 64),
  keyframes: int = 12,
  rotation: int | None = None,
  mirrored: bool = False,
  options: dict[str, str] | None = None,
) -> Path:
  """Writes frames 0, 1, ...; `times_ms` gives each its own time, else they come at `rate`."""
  with av.open(str(path), "w", options=options or {}) as container:
    stream = container.add_stream(codec, rate=rate)
    stream.height, stream.width = size_hw
    stream.pix_fmt = "gray" if codec == "gif" else "yuv420p"
    stream.gop_size, stream.bit_rate = keyframes, 4_000_000
    base = Fraction(1, 1000) if times_ms else Fraction(1, rate)
    stream.codec_context.time_base = base
    if rotation is not None:
      stream.set_display_rotation(rotation, hflip=mirrored)
    for i in range(count):
      frame = av.VideoFrame.from_ndarray(picture(i, size_hw), format="rgb24")
      frame = frame.reformat(format=stream.pix_fmt)
      frame.pts, frame.time_base = times_ms[i] if times_ms else i, base
      container.mux(stream.encode(frame))
    container.mux(stream.encode())
  return path


def write_audio(path: Path) -> Path:
  with av.open(str(path), "w") as container:
    stream = container.add_stream("pcm_s16le", rate=8000)
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
    frame.sample_rate = 8000
    container.mux(stream.encode(frame))
    container.mux(stream.encode())
  return path


def write_frames(folder: Path, count: int = 8, size_hw: tuple[int, int] = (48, 64)) -> Path:
  folder.mkdir(parents=True)
  for i in range(count):  # no leading zeros: only natural order is right
    Image.fromarray(picture(i, size_hw)).save(folder / f"{i}.png")
  return folder


@pytest.fixture(autouse=True)
def no_hang():
  """A reader that waits for ever is a failure, not a test run without an end."""

  def give_up(signum, frame):
    raise TimeoutError("the test has hung")

  before = signal.signal(signal.SIGALRM, give_up)
  signal.alarm(120)
  yield
  signal.alarm(0)
  signal.signal(signal.SIGALRM, before)


@pytest.fixture
def movies():
  """The functions above, since test folders do not import each other."""

  class Movies:
    picture = staticmethod(picture)
    number_of = staticmethod(number_of)
    write_video = staticmethod(write_video)
    write_audio = staticmethod(write_audio)
    write_frames = staticmethod(write_frames)

  return Movies

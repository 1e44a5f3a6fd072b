"""Optical-flow files: Middlebury's .flo and KITTI's 16-bit PNG; and folders of pairs with truth.

Flow is (flow_xy float32 [H, W, 2], valid bool [H, W]): (dx, dy) pixels from frame 1 to frame 2,
zero where it is not valid.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from jaxtyping import Bool, Float, Float32

from cwm_jax.data.images import IMAGE_SUFFIXES, MAX_PIXELS, natural_key, read_image, shown
from cwm_jax.types import InputError

_MAGIC = 202021.25
_HEADER = struct.Struct("<fii")
_UNKNOWN = 1e9  # Middlebury: components above this are unknown

_KITTI_SCALE, _KITTI_ZERO = 64.0, 2**15
_KITTI_TRUTHS = ("flow_occ", "flow_noc")
_KITTI_FRAMES = ("image_2", "colored_0")

Flow = tuple[Float32[np.ndarray, "h w 2"], Bool[np.ndarray, "h w"]]


class FlowPair(NamedTuple):
  """Two frames with the true flow between them.

  name: path of the flow file from the folder it was found in, without suffix.
  frame1, frame2: uint8 [H, W, 3], RGB.
  flow_xy: float32 [H, W, 2], pixels. valid: bool [H, W].
  """

  name: str
  frame1: np.ndarray
  frame2: np.ndarray
  flow_xy: np.ndarray
  valid: np.ndarray


def read_flo(path: str | os.PathLike[str]) -> Flow:
  """Reads a Middlebury .flo file; unknown (above 1e9) and non-finite vectors are not valid.

  Raises:
    InputError: missing, not a .flo file, or shorter or longer than its header says.
  """
  name = shown(path)
  if not os.path.isfile(path):
    raise InputError(f"{name} does not exist or is not a file")
  size = os.path.getsize(path)
  with open(path, "rb") as file:
    header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
      raise InputError(f"{name} is too short to be a .flo file ({size} bytes)")
    magic, width, height = _HEADER.unpack(header)
    if magic != _MAGIC:
      raise InputError(f"{name} is not a .flo file: it does not begin with the number {_MAGIC}")
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
      raise InputError(f"{name} claims a size of {width}x{height} pixels, which is not possible")
    expected = _HEADER.size + 8 * width * height
    if size != expected:
      raise InputError(f"{name} is {size} bytes; a flow of {width}x{height} takes {expected}")
    flow = np.frombuffer(file.read(), "<f4").reshape(height, width, 2)
  # NaN compares false, so it is not valid either.
  valid = np.all(np.abs(flow) <= _UNKNOWN, axis=-1)
  return np.where(valid[..., None], flow, 0).astype(np.float32), valid


def write_flo(
  path: str | os.PathLike[str],
  flow_xy: Float[np.ndarray, "h w 2"],
  valid: Bool[np.ndarray, "h w"] | None = None,
) -> None:
  """Writes a Middlebury .flo file; vectors that are not valid are written as 1e10."""
  height, width = flow_xy.shape[:2]
  if valid is not None:
    flow_xy = np.where(valid[..., None], flow_xy, 10 * _UNKNOWN)
  data = np.ascontiguousarray(flow_xy, "<f4").tobytes()
  Path(path).write_bytes(_HEADER.pack(_MAGIC, width, height) + data)


def is_kitti(path: str | os.PathLike[str]) -> bool:
  """Whether a file is a PNG of 16-bit RGB, as KITTI's flow files are, by its header."""
  with open(path, "rb") as file:
    start = file.read(26)
  # Depth and kind of colour (2: RGB) follow the size.
  return start[:8] == b"\x89PNG\r\n\x1a\n" and start[24:] == bytes([16, 2])


def read_kitti(path: str | os.PathLike[str]) -> Flow:
  """Reads KITTI's 16-bit PNG: (dx, dy) * 64 + 2**15 in red and green, valid in blue.

  Raises:
    InputError: missing, damaged, or not a 16-bit RGB PNG.
  """
  name = shown(path)
  if not os.path.isfile(path):
    raise InputError(f"{name} does not exist or is not a file")
  # Pillow reads 16-bit RGB as 8-bit; FFmpeg keeps every bit.
  try:
    with av.open(os.path.abspath(path), format="png_pipe") as container:
      frame = next(container.decode(video=0))
    kind = frame.format.name
    stored = frame.to_ndarray(format="rgb48le") if kind.startswith("rgb48") else None
  except (av.FFmpegError, OSError, StopIteration, IndexError, MemoryError) as error:
    raise InputError(f"{name} cannot be read as a PNG file") from error
  if stored is None:
    raise InputError(f"{name} is not 16-bit RGB, as KITTI's flow files are, but {kind}")
  valid = stored[..., 2] > 0
  flow = (stored[..., :2].astype(np.float32) - _KITTI_ZERO) / _KITTI_SCALE
  return np.where(valid[..., None], flow, np.float32(0)), valid


def fits_kitti(flow_xy: Float[np.ndarray, "h w 2"]) -> Bool[np.ndarray, "h w"]:
  """Which vectors KITTI's format can hold: those within [-512, 512) pixels."""
  return np.all((_scaled(flow_xy) >= 0) & (_scaled(flow_xy) < 2**16), axis=-1)


def _scaled(flow_xy: np.ndarray) -> np.ndarray:
  return np.round(flow_xy * _KITTI_SCALE) + _KITTI_ZERO


def write_kitti(
  path: str | os.PathLike[str],
  flow_xy: Float[np.ndarray, "h w 2"],
  valid: Bool[np.ndarray, "h w"] | None = None,
) -> None:
  """Writes KITTI's 16-bit PNG; flow is rounded to 1/64 pixel.

  Raises:
    InputError: a valid component lies outside [-512, 512), which the format cannot hold.
  """
  height, width = flow_xy.shape[:2]
  valid = np.ones((height, width), bool) if valid is None else valid
  if not fits_kitti(flow_xy)[valid].all():
    raise InputError(f"{shown(path)}: flow beyond 512 pixels does not fit KITTI's format; use .flo")
  scaled = np.where(valid[..., None], _scaled(flow_xy), 0)
  stored = np.concatenate([scaled, valid[..., None]], axis=-1)
  encoder = av.CodecContext.create("png", "w")
  encoder.width, encoder.height, encoder.pix_fmt = width, height, "rgb48be"
  encoder.time_base = Fraction(1)
  frame = av.VideoFrame.from_ndarray(stored.astype(np.uint16), format="rgb48be")
  frame.pts = 0
  packets = encoder.encode(frame) + encoder.encode(None)
  Path(path).write_bytes(b"".join(bytes(packet) for packet in packets))


def list_flow_files(root: str | os.PathLike[str]) -> list[str]:
  """The files with true flow below a folder, in natural order: .flo, and KITTI's by their folders.

  Of KITTI's two truths of a pair, that of all pixels (flow_occ) is taken before that of pixels seen
  in both frames (flow_noc); the latter's own folder as `root` gives the latter.

  Raises:
    InputError: there is none.
  """
  found = list(Path(root).rglob("*.flo")) if os.path.isdir(root) else []
  kitti = set(Path(root).rglob("*_10.png")) if os.path.isdir(root) else set()
  for path in kitti:
    folder = path.absolute().parent.name
    everywhere = path.parent.parent / _KITTI_TRUTHS[0] / path.name
    if folder in _KITTI_TRUTHS and (folder == _KITTI_TRUTHS[0] or everywhere not in kitti):
      found.append(path)
  if not found:
    raise InputError(f"{shown(root)} holds no .flo files, and no flow_occ/*_10.png as KITTI does")
  return sorted((os.fspath(path) for path in found), key=natural_key)


def iter_flow_pairs(root: str | os.PathLike[str]) -> Iterator[FlowPair]:
  """Pairs with truth below a folder, in the layouts of Middlebury, Sintel, FlyingChairs and KITTI.

  That is flow10.flo beside frame10.* and frame11.*; frame_0001.flo beside frame_0001.* and
  frame_0002.*; 00001_flow.flo beside 00001_img1.* and 00001_img2.*; or flow_occ/000001_10.png
  (or flow_noc/) with image_2/000001_10.png and 000001_11.png (2012: colored_0/).

  Raises:
    InputError: no file with flow, frames that are missing, or sizes that differ.
  """
  for path in list_flow_files(root):
    kitti = path.endswith(".png")
    flow_xy, valid = read_kitti(path) if kitti else read_flo(path)
    named = _kitti_frames_of(path) if kitti else _frames_of(path)
    frames = [read_image(frame) for frame in named]
    for frame in frames:
      if frame.shape[:2] != valid.shape:
        raise InputError(f"{shown(path)} and its frames differ in size")
    name = Path(path).relative_to(root).with_suffix("").as_posix()
    yield FlowPair(name, *frames, flow_xy, valid)


def _kitti_frames_of(path: str) -> list[str]:
  sequences = Path(path).absolute().parent.parent
  names = [Path(path).name.removesuffix("_10.png") + end for end in ("_10.png", "_11.png")]
  for folder in _KITTI_FRAMES:
    frames = [sequences / folder / name for name in names]
    if all(frame.is_file() for frame in frames):
      return [os.fspath(frame) for frame in frames]
  raise InputError(
    f"{shown(path)}: there are no images {names[0]} and {names[1]} in {shown(sequences)}, in a "
    f"folder {' or '.join(_KITTI_FRAMES)}"
  )


def _frames_of(path: str) -> list[str]:
  folder, stem = os.path.dirname(path), Path(path).stem
  if stem.endswith("_flow"):
    stems = [stem.removesuffix("flow") + part for part in ("img1", "img2")]
  else:
    digits = stem[len(stem.rstrip("0123456789")) :]
    text = stem.removesuffix(digits)
    base = "frame" if text == "flow" else text
    stems = [f"{base}{int(digits or 0) + i:0{len(digits)}}" for i in (0, 1)]
  found = []
  for wanted in stems:
    names = [n for n in os.listdir(folder) if Path(n).suffix.lower() in IMAGE_SUFFIXES]
    match = [name for name in sorted(names) if Path(name).stem == wanted]
    if not match:
      raise InputError(f"{shown(path)}: there is no image {wanted}.* beside it")
    found.append(os.path.join(folder, match[0]))
  return found

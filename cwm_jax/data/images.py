"""Image files and folders of frames, read as RGB uint8 with one sentence for whatever is wrong.

Called by the frame-folder source, the readers of truth and the command line.
"""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path

import numpy as np
from jaxtyping import Integer, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from cwm_jax.types import InputError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".webp", ".tif", ".tiff"})

# Four times an 8K frame: larger headers are damage, and would be paid for in memory.
MAX_PIXELS = 2**27


def shown(path: str | os.PathLike[str]) -> str:
  """A path as it can be printed: bytes of its name that are not text are written as escapes."""
  return os.fspath(path).encode("utf-8", "backslashreplace").decode()


def check_not_url(path: str | os.PathLike[str]) -> None:
  """Refuses an address.

  Raises:
    InputError: the path is a URL.
  """
  if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", os.fspath(path)):
    raise InputError(f"{shown(path)} is a URL; download it first, only local files are read")


def natural_key(path: str | os.PathLike[str]) -> list:
  """Sorts frame2 before frame10."""
  parts = re.split(r"([0-9]+)", os.fspath(path))
  # Text and numbers alternate, so entries of two keys are comparable place by place.
  return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def read_image(path: str | os.PathLike[str]) -> UInt8[np.ndarray, "h w 3"]:
  """Reads one image file as RGB, turned upright by its EXIF orientation; transparent is black.

  Grey of 16 bits is brought to 8: 65535 is white.

  Raises:
    InputError: the file is missing, a URL, no image, cut off, larger than 2**27 pixels, or of
      numbers (32 bits, floating point) of which it does not say what is white.
  """
  name = shown(path)
  check_not_url(path)
  if not os.path.exists(path):
    raise InputError(f"{name} does not exist")
  if not os.path.isfile(path):
    raise InputError(f"{name} is not a file; an image file is needed")
  try:
    # Pillow warns of large images; the limit below refuses those that are too large.
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", Image.DecompressionBombWarning)
      with Image.open(path) as image:
        if image.width * image.height > MAX_PIXELS:
          raise InputError(f"{name} claims {image.width}x{image.height} pixels, which is too large")
        sixteen_bits = _has_sixteen_bits(image, name)
        image = ImageOps.exif_transpose(image)
        if sixteen_bits:
          return _from_sixteen_bits(np.array(image), image.info.get("transparency"))
        if "A" in image.getbands() or "transparency" in image.info:
          return on_black(np.array(image.convert("RGBA")))
        return np.array(image.convert("RGB"))
  except InputError:
    raise
  except UnidentifiedImageError as error:  # its message repeats the path
    raise InputError(f"{name} is not an image, or is damaged at its beginning") from error
  # Pillow's decoders raise almost anything on damaged files (SyntaxError, struct.error, ...).
  except Exception as error:
    raise InputError(f"{name} cannot be read as an image: {error}") from error


def _has_sixteen_bits(image: Image.Image, name: str) -> bool:
  """Whether a picture is grey of 16 bits. Raises InputError where it has no known white."""
  if image.mode.startswith("I;16"):
    return True
  if image.mode not in ("I", "F"):
    return False
  # Of these formats Pillow holds 16 bits in 32.
  if image.mode == "I" and image.format in ("PNG", "PPM"):
    return True
  kind = "floating-point" if image.mode == "F" else "32-bit"
  raise InputError(
    f"{name} holds {kind} numbers, of which it is not known what is white; save it with 8 or 16 "
    "bits a channel"
  )


def _from_sixteen_bits(
  grey: Integer[np.ndarray, "h w"], transparent: int | None
) -> UInt8[np.ndarray, "h w 3"]:
  """Grey of 16 bits as RGB of 8, to the nearest level; the level that is transparent is black."""
  levels = ((grey.astype(np.uint32) + 128) // 257).astype(np.uint8)
  if transparent is not None:
    levels[grey == transparent] = 0
  return np.repeat(levels[..., None], 3, axis=-1)


def on_black(image: UInt8[np.ndarray, "h w 4"]) -> UInt8[np.ndarray, "h w 3"]:
  """RGB and opacity laid over black: what is hidden must not show through, nor change unseen."""
  opaque = image[..., 3:].astype(np.uint16)
  return ((image[..., :3] * opaque + 127) // 255).astype(np.uint8)


def list_images(folder: str | os.PathLike[str]) -> list[str]:
  """Paths of the image files directly in a folder, in natural order; hidden files are left out.

  Raises:
    InputError: the folder is missing, cannot be listed, or is not a folder.
  """
  check_not_url(folder)
  if not os.path.isdir(folder):
    kind = "is not a folder" if os.path.exists(folder) else "does not exist"
    raise InputError(f"{shown(folder)} {kind}; a folder of frames is needed")
  try:
    names = os.listdir(folder)
  except OSError as error:
    raise InputError(f"{shown(folder)} cannot be listed: {error.strerror}") from error
  kept = [
    name
    for name in names
    if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES
  ]
  return [os.path.join(folder, name) for name in sorted(kept, key=natural_key)]


def read_frames(folder: str | os.PathLike[str]) -> UInt8[np.ndarray, "t h w 3"]:
  """Reads a folder of frames, in natural order of their names.

  Raises:
    InputError: there are no frames, one cannot be read, or their sizes differ.
  """
  paths = list_images(folder)
  if not paths:
    raise InputError(f"{shown(folder)} holds no image files ({', '.join(sorted(IMAGE_SUFFIXES))})")
  return stack_frames([read_image(path) for path in paths], paths)


def stack_frames(frames: list[np.ndarray], paths: list[str]) -> UInt8[np.ndarray, "t h w 3"]:
  """Stacks frames of one size.

  Raises:
    InputError: sizes differ; names the first frame that does.
  """
  for frame, path in zip(frames, paths):
    if frame.shape != frames[0].shape:
      sizes = [f"{f.shape[1]}x{f.shape[0]}" for f in (frame, frames[0])]
      raise InputError(
        f"{shown(path)} is {sizes[0]} while {shown(paths[0])} is {sizes[1]}; frames need one size"
      )
  return np.stack(frames)

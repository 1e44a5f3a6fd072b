"""What an argument's text must be; each raises the error that argparse tells with the usage."""

from __future__ import annotations

import argparse

from cwm_jax import workdirs
from cwm_jax.types import InputError


def positive(text: str) -> int:
  """A whole number from 1 up."""
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
  return int(text)


def masks(text: str) -> int | str:
  """A number of masks, or adaptive ones."""
  return text if text == "adaptive" else positive(text)


def names(text: str) -> tuple[str, ...]:
  """Names with commas between."""
  return tuple(name.strip() for name in text.split(",") if name.strip())


def above_zero(text: str) -> float:
  """A finite number above 0."""
  try:
    value = float(text)
  except ValueError:
    value = 0.0
  if not 0 < value < float("inf"):
    raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
  return value


def folder(text: str) -> str:
  """A folder to write to, which may not be there yet; a bucket's URL is none."""
  try:
    workdirs.local(text)
  except InputError as error:
    raise argparse.ArgumentTypeError(str(error)) from None
  return text


def count(text: str) -> int:
  """A whole number from 0 up."""
  if not text.isdecimal():
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 up")
  return int(text)


def port(text: str) -> int:
  """A TCP port."""
  if not text.isdecimal() or not 1 <= int(text) < 2**16:
    raise argparse.ArgumentTypeError(f"{text!r} is not a port, 1 to 65535")
  return int(text)


def two_counts(text: str) -> tuple[int, int]:
  """Two whole numbers from 1 up with a comma between."""
  parts = text.split(",")
  if len(parts) != 2:
    raise argparse.ArgumentTypeError(f"{text!r} is not two whole numbers with a comma between")
  return positive(parts[0]), positive(parts[1])


def place(text: str) -> tuple[float, float]:
  """A point as X,Y."""
  try:
    x, y = (float(part) for part in text.split(","))
  except ValueError:
    raise argparse.ArgumentTypeError(f"{text!r} is not X,Y") from None
  return x, y

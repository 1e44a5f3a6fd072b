"""Between PyTorch's arrangement of a layer's numbers and ours; the vocabulary of key maps.

A layout raises InputError with the second half of a sentence; `keymaps` puts the tensor's name
before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Protocol, runtime_checkable

import numpy as np

from cwm_jax.types import InputError


@runtime_checkable
class Layout(Protocol):
  """What happens to the numbers between their tensors and ours."""

  def ours(self, theirs: Sequence[np.ndarray]) -> np.ndarray:
    """Our array from their tensors, in the rule's order."""
    ...

  def theirs(self, ours: np.ndarray) -> list[np.ndarray]:
    """Their tensors from our array; the inverse of `ours`."""
    ...


@dataclass(frozen=True)
class Same:
  """As it is: biases, norms."""

  def ours(self, theirs: Sequence[np.ndarray]) -> np.ndarray:
    return theirs[0]

  def theirs(self, ours: np.ndarray) -> list[np.ndarray]:
    return [ours]


@dataclass(frozen=True)
class Transposed:
  """A linear layer's weight: theirs [out, in], ours [in, out]."""

  def ours(self, theirs: Sequence[np.ndarray]) -> np.ndarray:
    return _of_rank(theirs[0], 2).T

  def theirs(self, ours: np.ndarray) -> list[np.ndarray]:
    return [ours.T]


@dataclass(frozen=True)
class Unbatched:
  """Theirs has `axes` leading axes of length 1, ours has none of them."""

  axes: int = 1

  def ours(self, theirs: Sequence[np.ndarray]) -> np.ndarray:
    array = theirs[0]
    if array.shape[: self.axes] != (1,) * self.axes:
      raise InputError(f"has shape {array.shape}, which does not begin with {self.axes} x 1")
    return array.reshape(array.shape[self.axes :])

  def theirs(self, ours: np.ndarray) -> list[np.ndarray]:
    return [ours.reshape((1,) * self.axes + ours.shape)]


@dataclass(frozen=True)
class PatchEmbedding:
  """Theirs a 3-D convolution [out, c, 1, p, p], ours [p * p * c, out]: row, column, channel."""

  channels: int = 3

  def ours(self, theirs: Sequence[np.ndarray]) -> np.ndarray:
    array = _of_rank(theirs[0], 5)
    return array.transpose(2, 3, 4, 1, 0).reshape(-1, array.shape[0])

  def theirs(self, ours: np.ndarray) -> list[np.ndarray]:
    side = isqrt(ours.shape[0] // self.channels)
    return [ours.reshape(1, side, side, self.channels, -1).transpose(4, 3, 0, 1, 2)]


@dataclass(frozen=True)
class Joined:
  """Theirs several vectors of one length, ours one, end to end.

  Attributes:
    parts: which part of ours each of theirs is.
    count: how many parts ours has; those that theirs lacks are zeros.
  """

  parts: tuple[int, ...]
  count: int

  def ours(self, theirs: Sequence[np.ndarray]) -> np.ndarray:
    joined = np.zeros((self.count, *theirs[0].shape), theirs[0].dtype)
    for part, array in zip(self.parts, theirs):
      if array.shape != theirs[0].shape:
        raise InputError(f"has shapes {theirs[0].shape} and {array.shape}, which should be equal")
      joined[part] = array
    return joined.reshape(-1)

  def theirs(self, ours: np.ndarray) -> list[np.ndarray]:
    split = ours.reshape(self.count, -1)
    for part in set(range(self.count)) - set(self.parts):
      _check_zero(split[part])
    return [split[part] for part in self.parts]


@dataclass(frozen=True)
class NoBias:
  """Theirs is a linear layer's weight [out, in] without a bias, ours that layer's bias, zero."""

  def ours(self, theirs: Sequence[np.ndarray]) -> np.ndarray:
    return np.zeros(_of_rank(theirs[0], 2).shape[0], theirs[0].dtype)

  def theirs(self, ours: np.ndarray) -> list[np.ndarray]:
    _check_zero(ours)
    return []


def _of_rank(array: np.ndarray, rank: int) -> np.ndarray:
  if array.ndim != rank:
    raise InputError(f"has shape {array.shape}, which should have {rank} axes")
  return array


def _check_zero(array: np.ndarray) -> None:
  if np.any(array):
    raise InputError("is not zero, and the release has no place for it")

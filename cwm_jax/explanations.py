"""What `Tracker.explain` shows of one question."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cwm_jax import geometry
from cwm_jax.counterfactual import engine
from cwm_jax.types import Explanation


def growing(
  asked: engine.Engine,
  pair: tuple[engine.Frame, engine.Frame],
  point_xy: np.ndarray,
  video_hw: tuple[int, int],
  *,
  masks_at_once: int,
) -> Iterator[Explanation]:
  """The explanation of an answer, growing by some masks at a time.

  Args:
    pair: as the engine prepared it.
    point_xy: [2], pixels of the frames as given.
    video_hw: their size.
    masks_at_once: a divisor of the number of masks.

  Yields:
    An Explanation of NumPy arrays, of the masks so far.
  """
  # On the host: on the device every number of masks would have programs of its own.
  one, two = (np.asarray(frame.small) for frame in pair)
  all_masks = np.asarray(asked.masks)[0, :, 1]
  for so_far in asked.explain(pair, point_xy, video_hw, masks_at_once=masks_at_once):
    marked, clean, answers, response, answer = so_far
    masks = all_masks[: len(clean)]
    hidden = masks.repeat(asked.patch, axis=1).repeat(asked.patch, axis=2)[..., None]
    yield Explanation(
      mark=marked - one,
      marked=_rgb(marked),
      masks=masks,
      clean=_rgb(np.where(hidden, clean, two)),
      counterfact=_rgb(np.where(hidden, answers, two)),
      responses=np.abs(answers - clean).sum(axis=-1),
      mean=np.asarray(response.heat)[0],
      from_xy=point_xy,
      to_xy=np.asarray(answer.xy)[0],
      visible=np.asarray(answer.visible)[0],
    )


def _rgb(frames: np.ndarray) -> np.ndarray:
  """`geometry.unnormalise` on the host."""
  return frames * np.float32(geometry.IMAGENET_STD) + np.float32(geometry.IMAGENET_MEAN)

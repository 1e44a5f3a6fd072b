"""What `Tracker.explain` shows of one question."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from cwm_jax import geometry
from cwm_jax.counterfactual import engine
from cwm_jax.counterfactual import masks as masks_lib
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
  one, two = pair
  for so_far in asked.explain(pair, point_xy, video_hw, masks_at_once=masks_at_once):
    marked, clean, answers, response, answer = so_far
    masks = asked.masks[0, : len(clean), 1]
    hidden = masks_lib.patches_to_pixels(masks, asked.patch)[..., None]

    def shown(prediction: Any, hidden: Any = hidden) -> np.ndarray:
      return np.asarray(geometry.unnormalise(jnp.where(hidden, prediction, two.small)))

    yield Explanation(
      mark=np.asarray(marked - one.small),
      marked=np.asarray(geometry.unnormalise(marked)),
      masks=np.asarray(masks),
      clean=shown(clean),
      counterfact=shown(answers),
      responses=np.asarray(jnp.sum(jnp.abs(answers - clean), axis=-1)),
      mean=np.asarray(response.heat[0]),
      from_xy=point_xy,
      to_xy=np.asarray(answer.xy[0]),
      visible=np.asarray(answer.visible[0]),
    )

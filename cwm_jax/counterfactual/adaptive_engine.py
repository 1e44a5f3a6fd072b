"""The engine for adaptive masks: clean predictions are made when a point first asks for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Bool

from cwm_jax.counterfactual import adaptive, budget, compiled, engine
from cwm_jax.types import InputError, PointFlow

# Points of the largest bucket where memory does not hold those of `engine.BUCKETS`.
_BETWEEN = 64


class AdaptiveEngine(engine.Engine):
  """As `Engine`, but each point chooses its masks; its masks are the bank."""

  def __init__(
    self,
    predict_fn: Any,
    mark: Any,
    masks: Bool[Array, "r b 2 gh gw"],
    *,
    rule: adaptive.Rule,
    patch: int,
    memory_budget: float | None,
    settings: Mapping[str, Any],
  ):
    """See `Engine`.

    Raises:
      InputError: zoom, the protocol "release", a rule that cannot be followed, or what `Engine`
        raises.
    """
    adaptive.check(rule)
    if masks.shape[0] > 1 or settings["protocol"] == "release":
      raise InputError("adaptive masks look at whole frames: no zoom, no protocol 'release'")
    super().__init__(
      predict_fn, mark, masks, patch=patch, memory_budget=memory_budget, settings=settings
    )
    self._rule = rule
    most = budget.most_carriers(self._laid)
    self.buckets = engine.BUCKETS
    if most < self.buckets[-1]:
      self.buckets = tuple(n for n in (*engine.BUCKETS[:-1], _BETWEEN) if n == 1 or n <= most)

  def parts(
    self,
    pairs: Sequence[tuple[engine.Frame, engine.Frame]],
    pair_of: np.ndarray,
    points_xy: np.ndarray,
    video_hw: tuple[int, int],
  ) -> Iterator[tuple[np.ndarray, PointFlow]]:
    """See `Engine.parts`."""
    for begin in range(0, len(pairs), self.pairs_at_once):
      group = pairs[begin : begin + self.pairs_at_once]
      mine = np.flatnonzero((pair_of >= begin) & (pair_of < begin + len(group)))
      if not mine.size:
        continue
      images = engine.flat([[f.small for f in pair] for pair in group], self.pairs_at_once)
      bank = self.run(
        compiled.empty_bank,
        self._predict_fn,
        self.masks,
        images[0],
        pairs=self.pairs_at_once,
        keep_tokens=self._keep_tokens,
      )
      for start in range(0, len(mine), self.buckets[-1]):
        where = mine[start : start + self.buckets[-1]]
        size = next(size for size in self.buckets if size >= len(where))
        # The bank given is used up.
        answer, marked, clean, bank = self.run(
          compiled.ask_adaptively,
          self._predict_fn,
          self._mark,
          images,
          self.masks,
          bank,
          np.resize(pair_of[where] - begin, size).astype(np.int32),
          np.resize(points_xy[where], (size, 2)).astype(np.float32),
          np.arange(size) < len(where),
          np.array(video_hw, np.int32),
          image_hw=self.image_hw,
          rule=self._rule,
          chunk=self.plan.clean,
          **self._settings,
        )
        self._count(marked, clean)
        yield where, answer

  def ask_grid(self, *args: Any, **settings: Any) -> PointFlow:
    """Not with adaptive masks: points that share a pass share its mask.

    Raises:
      InputError: always.
    """
    raise InputError("points that choose their masks are asked one by one: marks=1, no votes")

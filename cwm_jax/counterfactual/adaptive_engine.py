"""The engine for adaptive masks: clean predictions are made when a point first asks for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Bool

from cwm_jax.counterfactual import adaptive, compiled, engine
from cwm_jax.counterfactual.pending import Pending
from cwm_jax.types import InputError


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

  def ask(
    self,
    pairs: Sequence[tuple[engine.Frame, engine.Frame]],
    pair_of: np.ndarray,
    points_xy: np.ndarray,
    video_hw: tuple[int, int],
  ) -> Pending:
    """See `Engine.ask`."""
    parts = []
    for begin in range(0, len(pairs), self.pairs_at_once):
      group = pairs[begin : begin + self.pairs_at_once]
      mine = np.flatnonzero((pair_of >= begin) & (pair_of < begin + len(group)))
      if not mine.size:
        continue
      images = engine.flat([[f.small for f in pair] for pair in group], self.pairs_at_once)
      bank = compiled.empty_bank(
        self._predict_fn,
        self.masks,
        images[0],
        pairs=self.pairs_at_once,
        keep_tokens=self._keep_tokens,
      )
      for start in range(0, len(mine), engine.BUCKETS[-1]):
        where = mine[start : start + engine.BUCKETS[-1]]
        size = next(size for size in engine.BUCKETS if size >= len(where))
        answer, marked, clean, bank = compiled.ask_adaptively(
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
        parts.append((where, answer))
    return Pending(parts, len(points_xy))

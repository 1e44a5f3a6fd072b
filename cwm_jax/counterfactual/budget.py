"""From a byte budget to how much work an engine puts on the device at a time.

The passes in flight keep within the budget. What is held beside them, clean predictions, takes up
to a quarter more; those of one pair are held whatever the budget, for its points share them. What
points under adaptive masks carry from pass to pass takes up to half of the budget more.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cwm_jax.counterfactual import multimask

# Numbers of pairs whose clean predictions are held together, and of points in zoom, where they are
# powers of two so that every bucket divides into groups.
_PAIRS, _WINDOWS = (1, 4, 16), (1, 2, 4, 8, 16)
_SHARE_HELD, _SHARE_CARRIED = 0.25, 0.5
# The default budget: a share of a device that tells its size, a fixed amount on one that does not.
_SHARE_OF_DEVICE, _BYTES_ELSEWHERE = 0.25, 2**30
# More passes at once bring no more speed on an accelerator; on a CPU they cost it once attention
# scores fall out of cache: of passes that take 32 MiB each, five at once are 1.4 x slower than two.
_MAX_PASSES, _MAX_PASSES_ON_CPU, _BYTES_OF_PASSES_ON_CPU = 256, 16, 80 * 2**20


class Layout(NamedTuple):
  """What a budget allows.

  budget: bytes; what was given, or the default.
  held_bytes: what is kept of one clean pass.
  plan: how many passes run at once.
  pairs: whose clean predictions are held together.
  windows: in zoom, points whose windows' clean predictions are.
  """

  budget: float
  held_bytes: int
  plan: multimask.Plan
  pairs: int
  windows: int


def lay_out(
  predict_fn: multimask.PredictFn,
  *,
  image_hw: tuple[int, int],
  grid_hw: tuple[int, int],
  num_masks: int,
  keep_tokens: bool,
  memory_budget: float | None,
) -> Layout:
  """Measures one pass of the predictor and divides the budget by it.

  Args:
    predict_fn: see `engine.Engine`.
    image_hw, grid_hw: what it sees, in pixels and in patches.
    num_masks: clean predictions that are held of a pair; of adaptive masks the whole bank.
    keep_tokens: whether marks read tokens: then those of a pair are held with its predictions.
    memory_budget: bytes; None takes a quarter of the device's memory, or 1 GiB where that is not
      told.

  Raises:
    InputError: a budget below one pass.
  """
  device = jax.local_devices()[0]  # only a process's own devices tell their memory
  if memory_budget is None:
    told = (device.memory_stats() or {}).get("bytes_limit", 0)
    memory_budget = told * _SHARE_OF_DEVICE or _BYTES_ELSEWHERE
  pass_bytes = multimask.measure_pass_bytes(predict_fn, image_hw, grid_hw)
  max_passes = _MAX_PASSES
  if device.platform == "cpu":
    max_passes = min(_MAX_PASSES_ON_CPU, int(_BYTES_OF_PASSES_ON_CPU // pass_bytes))
  plan = multimask.plan(
    num_masks, pass_bytes=pass_bytes, memory_budget=memory_budget, max_passes=max_passes
  )
  image, tokens, token = _clean_bytes(predict_fn, image_hw, grid_hw)
  if not keep_tokens:
    tokens = token = 0
  held = image + tokens

  def fitting(counts, bytes_of):
    """The largest number whose clean predictions, of so many bytes each, fit."""
    fit = [n for n in counts if n * num_masks * bytes_of(n) < memory_budget * _SHARE_HELD]
    return max(fit, default=1)

  pairs = fitting(_PAIRS, lambda n: held)
  # In zoom a clean prediction keeps, of its tokens, one for each of the points.
  windows = fitting(_WINDOWS, lambda n: image + n * token)
  return Layout(memory_budget, held, plan, pairs, windows)


def most_carriers(laid: Layout) -> float:
  """How many points may be under way at once, where each carries what it was told so far.

  That is its sums, its clean prediction in and out of the order of turns, and copies of these: in
  compiled programs two to three clean predictions a point.
  """
  return laid.budget * _SHARE_CARRIED / (4 * laid.held_bytes)


def _clean_bytes(
  predict_fn: multimask.PredictFn, image_hw: tuple[int, int], grid_hw: tuple[int, int]
) -> tuple[int, int, int]:
  """Bytes of what comes out of one clean pass: the image, all tokens, one token."""
  shapes = jax.eval_shape(
    lambda: predict_fn(jnp.zeros((1, 2, *image_hw, 3)), jnp.zeros((1, 2, *grid_hw), bool))
  )
  image, tokens = (0 if x is None else x.size * x.dtype.itemsize for x in shapes)
  return image, tokens, tokens // math.prod(shapes.tokens.shape[:-1]) if tokens else 0

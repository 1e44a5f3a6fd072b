"""Compiled programs stay near the bytes that they were planned for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
import toy_predictors as toys

from cwm_jax.configs import opt_cwm
from cwm_jax.counterfactual import budget, multimask
from cwm_jax.tracker import Tracker
from cwm_jax.types import Prediction

HW, PATCH, WIDTH = (32, 48), 8, 64
GRID = (HW[0] // PATCH, HW[1] // PATCH)
IMAGE_BYTES = 4 * 3 * HW[0] * HW[1]


def _wide(frames, mask):
  """Passes through twenty times as many numbers as it predicts, so that passes are what counts."""
  into, out = (jax.random.normal(jax.random.key(i), (3, WIDTH)) for i in range(2))
  return toys.hidden_only(jnp.sin(frames[:, 0] @ into) @ out.T, mask)


@pytest.fixture(scope="module")
def pass_bytes():
  return multimask.measure_pass_bytes(_wide, HW, GRID)


def _tracker(budget, num_masks):
  sizes = dict(image_hw=HW, patch=PATCH, mask_ratio=0.75)
  return Tracker(_wide, **sizes, num_masks=num_masks, memory_budget=budget)


def _memory(tracker, **asked):
  """What the compiler says of each program that the questions take."""
  return [program.memory_analysis() for program in tracker.compile((40, 60), **asked)]


def test_the_passes_of_compiled_programs_stay_below_the_budget_and_make_use_of_it(pass_bytes):
  working = {}
  for passes in (1, 8):
    made = _memory(_tracker(passes * pass_bytes, 8), points=16)
    working[passes] = [memory.temp_size_in_bytes for memory in made]
    # What is held of a group of pairs is a quarter of the budget at most, or one pair's.
    held = max(memory.output_size_in_bytes for memory in made)
    assert held < 1.1 * max(8 * IMAGE_BYTES, passes * pass_bytes / 4) + 4 * IMAGE_BYTES
  assert len(working[1]) == 2  # clean passes, marked passes
  assert max(working[1]) <= pass_bytes < min(working[8])
  assert max(working[8]) <= 8 * pass_bytes


def test_points_under_adaptive_masks_carry_no_more_than_the_budget_allows(pass_bytes):
  # 256 points would carry four times the budget.
  tracker = _tracker(2 * pass_bytes, "adaptive")
  assert tracker._engine.buckets == (1, 16) and tracker._engine.pairs_at_once == 1
  assert max(m.temp_size_in_bytes for m in _memory(tracker)) <= 1.5 * 2 * pass_bytes
  assert _tracker(8 * pass_bytes, "adaptive")._engine.buckets == (1, 16, 64)
  assert _tracker(2**30, "adaptive")._engine.buckets == (1, 16, 256)


def test_the_bank_of_adaptive_masks_is_counted_and_filled_in_its_place(pass_bytes):
  tracker = _tracker(8 * pass_bytes, "adaptive")
  pairs = tracker._engine.pairs_at_once
  bank = pairs * tracker._engine.masks.shape[1] * IMAGE_BYTES
  assert pairs == 4 and bank <= 8 * pass_bytes / 4 < 4 * bank
  empty, asked = _memory(tracker, points=1)
  assert bank <= empty.output_size_in_bytes < 1.1 * bank
  # The bank that is handed back lies in that which was given, and nowhere is there a second one.
  assert bank <= asked.alias_size_in_bytes < 1.1 * bank
  assert asked.temp_size_in_bytes < bank


def test_zoom_of_the_largest_release_holds_several_points_clean_predictions():
  model = opt_cwm.model("opt-cwm-512")
  (h, w), patch, width = model["image_hw"], model["patch"], model["encoder_width"]

  def shaped(frames, mask):
    """As large as the network's answers; what a pass takes inside is another test's."""
    tokens = jnp.zeros((len(frames), h // patch, w // patch, width))
    return Prediction(frames[:, 1] * 1.0, tokens)

  sizes = dict(image_hw=(h, w), grid_hw=(h // patch, w // patch), num_masks=10)
  laid = budget.lay_out(shaped, **sizes, keep_tokens=True, memory_budget=2.0**30)
  # All tokens of its passes, 12.6 MB each, would leave room for one point.
  assert laid.windows == 8 and laid.pairs == 1
  held = laid.windows * 10 * 4 * (3 * h * w + laid.windows * width)
  assert held < 2**30 / 4
  plain = budget.lay_out(shaped, **sizes, keep_tokens=False, memory_budget=2.0**30)
  assert (plain.windows, plain.pairs) == (8, 4)

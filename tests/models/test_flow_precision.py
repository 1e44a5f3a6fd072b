"""Products of flows and of features keep all of float32, whatever a device would rather do."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest

from cwm_jax.models import correlation, flow_updates


def precisions(fn, *arguments) -> list[str]:
  """What is asked of every product in `fn` and in its gradient."""
  both = jax.value_and_grad(lambda *inputs: fn(*inputs).sum(), argnums=(0, 1))
  told = str(jax.make_jaxpr(both)(*arguments))
  products = re.findall(r"dot_general\[(.*?)\n\s*\]", told, flags=re.DOTALL)
  assert len(products) == told.count("dot_general[")
  return [product.partition("precision=")[2].split("\n")[0] for product in products]


@pytest.mark.parametrize("way", ["all_pairs", "on_demand"])
def test_correlations_are_worked_out_in_full_float32(way):
  places = jnp.zeros((1, 8, 8, 2))

  def found(first, second):
    correlated = correlation.correlate(first, second, levels=2, way=way)
    return correlation.look_up(correlated, places, radius=1)

  features = jnp.ones((1, 8, 8, 4))
  asked = precisions(found, features, features)
  assert len(asked) >= 6 and all(precision.count("HIGHEST") for precision in asked), asked


def test_convex_upsampling_is_worked_out_in_full_float32():
  asked = precisions(
    flow_updates.upsample_convex, jnp.ones((1, 2, 2, 2)), jnp.ones((1, 2, 2, 9 * 64))
  )
  assert len(asked) == 3 and all(precision.count("HIGHEST") for precision in asked), asked

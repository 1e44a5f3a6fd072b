"""The network behind learned marks."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cwm_jax.models.perturber import Perturber


@partial(jax.jit, static_argnames="net")
def fresh(net, tokens):
  return net.apply(net.init(jax.random.key(1), tokens), tokens)


def test_at_first_the_channels_of_a_white_mark_coincide_and_those_of_a_plain_one_do_not():
  tokens = jax.random.normal(jax.random.key(0), (5, 12))
  for kind, same in (("white", True), ("plain", False)):
    net = Perturber(hidden_width=16, init_kind=kind)
    numbers = fresh(net, tokens).reshape(5, 3, 6)
    assert np.allclose(numbers, numbers[:, :1], atol=1e-6) is same
    near = np.abs(numbers[..., :2]).max() < 0.5 and np.all(numbers[..., 5] > 0.2)
    assert near == (kind == "white")  # a white mark begins as a bump on its query
    # Neither says the same of every token, nor the same six numbers.
    assert numbers.std(axis=0).min() > 0.01 and numbers.std(axis=2).min() > 0.01


def test_numbers_are_float32_within_one_whatever_the_tokens():
  tokens = 100 * jax.random.normal(jax.random.key(0), (2, 3, 12), jnp.bfloat16)
  net = Perturber(hidden_width=16)
  numbers = fresh(net, tokens)
  assert numbers.shape == (2, 3, 18) and numbers.dtype == jnp.float32
  assert float(jnp.abs(numbers).max()) <= 1


def test_an_unknown_initialisation_is_named():
  with pytest.raises(ValueError, match="'grey'; choose one of white, plain"):
    Perturber(init_kind="grey").init(jax.random.key(0), jnp.zeros((1, 4)))

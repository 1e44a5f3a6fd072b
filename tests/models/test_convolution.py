"""The convolution with a gradient of its own is the library's."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cwm_jax.models.flow_encoders import conv


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (1, 5), (5, 1), (7, 7)])
@pytest.mark.parametrize("stride", [1, 2])
def test_values_and_gradients_are_those_of_a_plain_convolution(kernel, stride):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(2, 9, 6, 3)), jnp.float32)
  padding = [(side // 2, side // 2) for side in kernel]
  plain = nn.Conv(4, kernel, stride, padding=padding)
  ours = conv(4, kernel, stride=stride)
  variables = ours.init(jax.random.key(0), x)

  def found(net):
    def total(variables, x):
      y = net.apply(variables, x)
      return jnp.sum(jnp.sin(y)), y

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(variables, x)

  (_, want), slopes = found(plain)
  (_, got), own_slopes = found(ours)
  np.testing.assert_allclose(got, want, atol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), own_slopes, slopes)
  # In a loop too, whose gradient adds up over the iterations.
  if stride == 1 and kernel == (3, 3):
    again = conv(3, kernel)
    variables = again.init(jax.random.key(1), x)

    def loop(net):
      def total(variables):
        step = lambda x, _: (jnp.tanh(net.apply(variables, x)), None)  # noqa: E731
        return jnp.sum(jax.lax.scan(step, x, None, length=3)[0] ** 2)

      return jax.jit(jax.grad(total))(variables)

    same = loop(nn.Conv(3, kernel, padding=padding))
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), loop(again), same
    )

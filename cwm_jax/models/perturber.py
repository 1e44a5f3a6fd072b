"""The perturber (MLP_theta): from a patch's token to the numbers of the mark that suits it.

What the numbers mean, and how the mark is drawn, is `counterfactual/gaussian.py`'s business.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

CHANNELS, PER_CHANNEL = 3, 6
INITS = ("white", "plain")
# "white" before its tanh, for every token: on the query, narrow, round, half as high as can be.
_WHITE = (0.0, 0.0, -0.8, -0.8, 0.0, 0.55)
_WHITE_SPREAD = 0.1  # how far tokens' numbers lie from these at first


def white_init(key, shape, dtype=jnp.float32):
  """Kernel [in, 18] whose three channels begin as one, so that the mark begins as a grey bump."""
  one = plain_init(key, (shape[0], shape[1] // CHANNELS), dtype)
  return jnp.tile(one, (1, CHANNELS))


def plain_init(key, shape, dtype=jnp.float32):
  """Kernel [in, out], uniform within 1 / sqrt(in)."""
  return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")(key, shape, dtype)


def _white_bias(key, shape, dtype=jnp.float32):
  return jnp.tile(jnp.array(_WHITE, dtype), CHANNELS)


class Perturber(nn.Module):
  """Two hidden layers, linear, norm and ReLU each; then linear, norm and tanh.

  It runs in float32 whatever the predictor's dtype: it is tiny, and the marks are subtle.

  Attributes:
    hidden_width: of both hidden layers.
    init_kind: "white" (the paper's WBinit: the three colour channels coincide at first; here the
      mark also begins on its query, about as narrow as a mark can be) or "plain".
  """

  hidden_width: int = 512
  init_kind: str = "white"

  @nn.compact
  def __call__(self, tokens: Float[Array, "*b c"]) -> Float[Array, "*b 18"]:
    """The mark's numbers for each token, in (-1, 1), six a colour channel.

    Args:
      tokens: the encoder's last normalised output at the query's patch.

    Raises:
      ValueError: an unknown `init_kind`.
    """
    if self.init_kind not in INITS:
      raise ValueError(f"perturber init is {self.init_kind!r}; choose one of {', '.join(INITS)}")
    x = tokens.astype(jnp.float32)
    for layer in (1, 2):
      x = nn.Dense(self.hidden_width, kernel_init=plain_init, name=f"fc{layer}")(x)
      x = nn.relu(nn.LayerNorm(epsilon=1e-5, name=f"norm{layer}")(x))
    last, norm = plain_init, {}
    if self.init_kind == "white":
      last = white_init
      norm = dict(scale_init=nn.initializers.constant(_WHITE_SPREAD), bias_init=_white_bias)
    x = nn.Dense(CHANNELS * PER_CHANNEL, kernel_init=last, name="fc3")(x)
    return jnp.tanh(nn.LayerNorm(epsilon=1e-5, name="norm3", **norm)(x))

"""Two streams of tokens, primary and secondary, in blocks that may let each look at the other.

What a block does is written as its links, "o<->o": an "o" on the left where the primary stream
attends to itself and has an MLP, on the right where the secondary one has; "_" where not; and
arrows for attention across, "<-" onto the primary stream, "->" onto the secondary one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from cwm_jax.models import layers

_xavier = nn.initializers.xavier_uniform()


class Links(NamedTuple):
  """What a block does."""

  primary: bool
  secondary: bool
  onto_primary: bool
  onto_secondary: bool


def parse_links(links: str) -> Links:
  """What the links of a block say.

  Raises:
    ValueError: not of the form "o<->o".
  """
  match = re.fullmatch(r"([o_])(<?)-(>?)([o_])", links)
  if not match:
    raise ValueError(f"the links of a block look like 'o<->o', 'o<-_' or 'o-_', not {links!r}")
  left, onto_left, onto_right, right = match.groups()
  return Links(left == "o", right == "o", bool(onto_left), bool(onto_right))


def runs(links: Sequence[str]) -> list[tuple[str, range]]:
  """Blocks of equal links in a row: (links, the blocks' numbers)."""
  found, first = [], 0
  for kind, group in groupby(links):
    count = len(list(group))
    found.append((kind, range(first, first + count)))
    first += count
  return found


def run_name(numbers: range) -> str:
  """The name of a run's stacked parameters."""
  return f"blocks{numbers.start}"


class CrossAttention(nn.Module):
  """x plus what it finds in another stream; norms of their own for queries, keys and values."""

  heads: int
  attention_impl: str | None = None
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "b n c"], other: Float[Array, "b m c"]
  ) -> Float[Array, "b n c"]:
    c = x.shape[-1]

    def projected(tokens, name):
      # Norms run in float32 whatever the compute dtype.
      norm = nn.LayerNorm(epsilon=1e-6, dtype=jnp.float32, name=f"norm_{name}")
      dense = nn.Dense(c, dtype=self.dtype, kernel_init=_xavier, name=name)
      y = dense(norm(tokens).astype(self.dtype))
      return y.reshape(*y.shape[:2], self.heads, c // self.heads)

    q, k, v = projected(x, "q"), projected(other, "k"), projected(other, "v")
    found = layers.attend(q, k, v, self.attention_impl).reshape(x.shape)
    return x + nn.Dense(c, dtype=self.dtype, kernel_init=_xavier, name="proj")(found)


class ConjoinedBlock(nn.Module):
  """One block of both streams.

  First each attends to itself, then the primary stream looks at the secondary one, then come the
  MLPs, and last the secondary stream looks at what the primary one has become.

  Attributes:
    links: see the module's docstring.
    heads: of attention within a stream.
    cross_heads: of attention across.
  """

  links: str
  heads: int
  cross_heads: int
  mlp_ratio: float = 4.0
  attention_impl: str | None = None
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(
    self, streams: tuple[Float[Array, "b n c"], Float[Array, "b m c"]]
  ) -> tuple[tuple[Float[Array, "b n c"], Float[Array, "b m c"]], None]:
    """In the form that `nn.scan` wants: (carry) -> (carry, None)."""
    links = parse_links(self.links)
    settings = dict(attention_impl=self.attention_impl, dtype=self.dtype)
    norm = partial(nn.LayerNorm, epsilon=1e-6, dtype=jnp.float32)
    across = partial(CrossAttention, self.cross_heads, **settings)

    def attended(x, name):
      y = norm(name=f"{name}_norm1")(x).astype(self.dtype)
      return x + layers.Attention(self.heads, **settings, name=f"{name}_attn")(y)

    def thought_over(x, name):
      y = norm(name=f"{name}_norm2")(x).astype(self.dtype)
      return x + layers.mlp(y, self.mlp_ratio, self.dtype, prefix=f"{name}_")

    primary, secondary = streams
    if links.primary:
      primary = attended(primary, "primary")
    if links.secondary:
      secondary = attended(secondary, "secondary")
    if links.onto_primary:
      primary = across(name="onto_primary")(primary, secondary)
    if links.primary:
      primary = thought_over(primary, "primary")
    if links.secondary:
      secondary = thought_over(secondary, "secondary")
    if links.onto_secondary:
      secondary = across(name="onto_secondary")(secondary, primary)
    return (primary, secondary), None


class TwoStreamStack(nn.Module):
  """Blocks in a row, each with its links; those alike that follow each other are scanned.

  Attributes:
    links: of each block.
    The rest: see `ConjoinedBlock` and `layers.repeated`.
  """

  links: Sequence[str]
  heads: int
  cross_heads: int
  mlp_ratio: float = 4.0
  attention_impl: str | None = None
  dtype: jnp.dtype = jnp.float32
  remat: str = "none"

  @nn.compact
  def __call__(
    self, primary: Float[Array, "b n c"], secondary: Float[Array, "b m c"]
  ) -> tuple[Float[Array, "b n c"], Float[Array, "b m c"]]:
    streams = primary, secondary
    for links, numbers in runs(self.links):
      block = layers.repeated(ConjoinedBlock, len(numbers), remat=self.remat)(
        links,
        self.heads,
        self.cross_heads,
        self.mlp_ratio,
        self.attention_impl,
        self.dtype,
        name=run_name(numbers),
      )
      streams, _ = block(streams)
    return streams

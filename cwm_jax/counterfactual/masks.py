"""Temporally factored masks: frame 1 all visible, a fixed number of visible patches in frame 2."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key, Shaped

from cwm_jax.types import InputError

REVEALS = ("spread", "release")


def num_visible_patches(grid_hw: tuple[int, int], mask_ratio: float) -> int:
  """How many of frame 2's patches stay visible.

  Of n patches int(n * mask_ratio), truncated, are hidden (VideoMAE's rule), the rest is visible:
  103 of 1024 at a ratio of 0.9.

  Raises:
    InputError: a ratio outside (0, 1], or one so small that nothing would be hidden.
  """
  n = grid_hw[0] * grid_hw[1]
  if not 0.0 < mask_ratio <= 1.0:
    raise InputError(f"the mask ratio is {mask_ratio}; give a number above 0 and at most 1")
  hidden = int(n * mask_ratio)
  if hidden == 0:
    raise InputError(
      f"a mask ratio of {mask_ratio} hides none of {n} patches, which leaves nothing to predict; "
      f"take at least {1 / n:.3g}"
    )
  return n - hidden


def sample_masks(
  key: Key[Array, ""], grid_hw: tuple[int, int], num_visible: int, shape: tuple[int, ...] = ()
) -> Bool[Array, "*s 2 gh gw"]:
  """Random masks (True: hidden) with exactly `num_visible` visible patches of frame 2.

  Args:
    key: a typed key.
    grid_hw: patches per column and per row.
    num_visible: visible patches of frame 2; frame 1 is wholly visible.
    shape: leading shape, one independent mask each.
  """
  gh, gw = grid_hw
  scores = jax.random.uniform(key, (*shape, gh * gw))
  # Ranks, not a threshold on scores: equal scores must not change the count.
  rank = jnp.argsort(jnp.argsort(scores, axis=-1), axis=-1)
  second = (rank >= num_visible).reshape(*shape, 1, gh, gw)
  return jnp.concatenate([jnp.zeros_like(second), second], axis=-3)


def patches_to_pixels(values: Shaped[Array, "*s gh gw"], patch: int) -> Shaped[Array, "*s h w"]:
  """Spreads one value a patch over the patch's pixels."""
  return jnp.repeat(jnp.repeat(values, patch, axis=-2), patch, axis=-1)


def hide_neighbourhood(
  masks: Bool[Array, "m 2 gh gw"],
  centre_rc: Int[Array, " 2"],
  *,
  radius: int = 1,
  reveal: str = "spread",
) -> Bool[Array, "m 2 gh gw"]:
  """Hides the patches of frame 2 round `centre_rc`, and reveals as many others instead.

  The destination can only answer where it is hidden; near a good guess it should be hidden in every
  mask. The number of visible patches stays what it was, since it is a static size.

  Args:
    masks: True where hidden.
    centre_rc: (row, column) of the patch in the middle.
    radius: 1 hides 3 x 3 patches.
    reveal: which others are revealed: "spread" takes them from all over the image and never from
      the neighbourhood; "release" takes the first hidden ones in raster order, the public release's
      choice, which lean to the top and may lie in the neighbourhood itself.

  Raises:
    InputError: an unknown choice.
  """
  if reveal not in REVEALS:
    raise InputError(f"the choice is {reveal!r}; choose one of {', '.join(REVEALS)}")
  gh, gw = masks.shape[-2:]
  rows, cols = jnp.arange(gh), jnp.arange(gw)
  near = (jnp.abs(rows - centre_rc[0]) <= radius)[:, None] & (
    jnp.abs(cols - centre_rc[1]) <= radius
  )[None]
  second = masks[:, 1].reshape(-1, gh * gw)
  near = near.reshape(-1)
  lost = jnp.sum(near & ~second, axis=-1, keepdims=True)
  if reveal == "release":
    order, candidate = np.arange(gh * gw), second
  else:
    # Which ones to reveal must not lean to one side of the image: a fixed shuffled order.
    order, candidate = np.random.default_rng(0).permutation(gh * gw), second & ~near
  candidate = candidate[:, order]
  revealed = candidate & (jnp.cumsum(candidate, axis=-1) <= lost)
  second = (second | near) & ~revealed[:, np.argsort(order)]
  return masks.at[:, 1].set(second.reshape(-1, gh, gw))

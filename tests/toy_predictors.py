"""Predictors of a few lines whose motion is known exactly."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cwm_jax.types import Prediction


def hidden_only(image, mask):
  """A Prediction that is 0 on the revealed patches, as the contract wants."""
  patch = image.shape[1] // mask.shape[2]
  hidden = jnp.repeat(jnp.repeat(mask[:, 1], patch, axis=1), patch, axis=2)
  return Prediction(jnp.where(hidden[..., None], image, 0.0))


def shifted_by(dy: int, dx: int):
  """Predicts frame 1 moved by (dy, dx) pixels, wrapping round, whatever frame 2 shows."""

  def predict(frames, mask):
    return hidden_only(jnp.roll(frames[:, 0], (dy, dx), axis=(1, 2)), mask)

  return predict


def matching(frames, mask):
  """Finds the one shift between the two frames and predicts frame 1 moved by it, so it looks."""

  def best(pair):
    spectra = jnp.fft.fft2(jnp.mean(pair, axis=-1))
    cross = spectra[1] * jnp.conj(spectra[0])
    peak = jnp.fft.ifft2(cross / (jnp.abs(cross) + 1e-6)).real
    return jnp.unravel_index(jnp.argmax(peak), peak.shape)

  # The fixed reference is frame 1 as it came: the mark is too small to change the match.
  move = jax.vmap(lambda pair, shift: jnp.roll(pair[0], shift, axis=(0, 1)))
  return hidden_only(move(frames, jax.vmap(best)(frames)), mask)

"""Adaptive masks: each point chooses its next mask by its response so far, and stops when settled.

A mask tells most about a point when it hides the patch where the response is highest so far, and
reveals the patches round it: the surroundings pin the motion down there, and a false peak loses its
hold. So every point picks from one bank of masks, whose clean predictions all points share, and a
point whose peak keeps its place and towers over its rivals takes no more passes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cwm_jax import geometry
from cwm_jax.counterfactual import flow, multimask, perturb
from cwm_jax.types import InputError, PointFlow, Prediction


class Rule(NamedTuple):
  """When a point takes which mask, and when it stops.

  bank:   masks to choose from.
  first:  masks that every point takes in the bank's order, before it chooses.
  least:  masks that every point takes.
  most:   masks after which it stops in any case.
  margin: a peak is settled when it is so many times as high as the highest response further away
          than a patch, ...
  still:  ... and lay within a pixel (a quarter of a patch, if that is more) so many masks before.
  """

  bank: int = 32
  first: int = 2
  least: int = 4
  most: int = 16
  margin: float = 1.5
  still: int = 2


class Bank(NamedTuple):
  """Clean predictions of some pairs, worked out when a point first asks for them.

  clean: leaves [p, b, ...]: image and, where a mark reads them, tokens.
  known: bool [p, b].
  """

  clean: Prediction
  known: Bool[Array, "p b"]


class _State(NamedTuple):
  """What a point has been told so far; leading axis [n]."""

  total: Array  # sums over its masks, see `multimask.sum_over_masks`
  peak: Array
  hidden: Array  # [n, gh, gw], how many of its masks hid a patch
  taken: Array  # bool [n, b]
  tops_yx: Array  # int [n, still + 1, 2], where the peak lay, the latest first
  active: Array  # bool [n]


def check(rule: Rule) -> None:
  """Raises InputError where a rule cannot be followed."""
  if not 1 <= rule.first <= rule.least <= rule.most <= rule.bank:
    raise InputError(
      "an adaptive rule has 1 <= first <= least <= most <= bank, not "
      f"{rule.first}, {rule.least}, {rule.most}, {rule.bank}"
    )
  if rule.still < 1 or rule.margin < 1:
    raise InputError(f"still ({rule.still}) and margin ({rule.margin}) are 1 or more")


def empty_bank(
  predict_fn: multimask.PredictFn,
  frames: Float[Array, "p 2 h w 3"],
  masks: Bool[Array, "b 2 gh gw"],
  *,
  keep_tokens: bool,
) -> Bank:
  """A bank in which nothing is known yet."""
  made = jax.eval_shape(predict_fn, frames[:1], masks[:1])
  made = made if keep_tokens else made._replace(tokens=None)
  held = (len(frames), len(masks))
  zeros = jax.tree.map(lambda s: jnp.zeros((*held, *s.shape[1:]), s.dtype), made)
  return Bank(zeros, jnp.zeros(held, bool))


def flow_points(
  predict_fn: multimask.PredictFn,
  mark: Any,
  frames: Float[Array, "p 2 h w 3"],
  masks: Bool[Array, "b 2 gh gw"],
  bank: Bank,
  pair_of: Int[Array, " n"],
  points_xy: Float[Array, "n 2"],
  valid: Bool[Array, " n"],
  *,
  rule: Rule,
  chunk: int,
  order: str,
  average: str,
  **reading: Any,
) -> tuple[PointFlow, Int[Array, " n"], Bank]:
  """Destinations of points of several pairs, each under masks of its own choice.

  Args:
    predict_fn, mark: see `flow.flow_points`.
    frames: normalised pairs.
    masks: the bank's, for all pairs.
    bank: what is known of these pairs; all points of a pair may share it, call after call.
    pair_of: index of each point's pair.
    points_xy: continuous (x, y), pixels of the predictor's image.
    valid: False for padding.
    rule: see `Rule`.
    chunk: passes that run together.
    order, average: of `multimask.respond`.
    **reading: of `flow.read_out`.

  Returns:
    xy [n, 2] (pixels of the predictor's image), visible [n], confidence [n]; how many masks each
    point took, 0 for padding; and the bank with what was worked out.
  """
  n, b = len(points_xy), len(masks)
  gh, gw = masks.shape[2:]
  patch = frames.shape[2] // gh
  averaging = dict(order=order, average=average)

  def choose(state: _State, step: Array) -> Array:
    row, col = jnp.moveaxis(state.tops_yx[:, 0] // patch, -1, 0)
    row, col = jnp.clip(row, 0, gh - 1), jnp.clip(col, 0, gw - 1)  # there is no peak yet at first
    free = jnp.where(state.taken, -jnp.inf, _worth(masks[:, 1], state.hidden, row, col))
    return jnp.where(step < rule.first, step, jnp.argmax(free, axis=1)).astype(jnp.int32)

  def passes(items):
    """Sums over the one mask of each item."""
    point, number, clean = items
    pair = pair_of[point]
    marked = multimask.mark_frames(mark, frames[pair, 0], clean.tokens, points_xy[point])
    answer = multimask.marked_predictions(
      predict_fn, marked, frames[pair, 1], masks[number][:, None]
    )
    colours = None
    if order == "matched":
      colours, _ = multimask.mark_colours(marked - frames[pair, :1])
    return multimask.sum_over_masks(answer - clean.image, order=order, colours=colours)

  def advance(carry):
    state, bank, step = carry
    number = choose(state, step)
    bank = _fill(predict_fn, frames, masks, bank, pair_of, number, state.active, chunk=chunk)
    clean = jax.tree.map(lambda x: x[pair_of, number][:, None], bank.clean)
    # Those that go on come first, so that the others' chunks are skipped.
    turn = jnp.argsort(~state.active)
    items = jax.tree.map(lambda x: x[turn], (jnp.arange(n), number, clean))
    sums = multimask.map_chunks(passes, items, state.active[turn], chunk=chunk)
    back = jnp.argsort(turn)
    goes = state.active
    add = lambda old, new: old + jnp.where(goes.reshape(-1, *[1] * (old.ndim - 1)), new, 0)  # noqa: E731
    total, peak = (add(old, new[back]) for old, new in zip((state.total, state.peak), sums))
    hidden = add(state.hidden, masks[number, 1].astype(jnp.float32))
    taken = state.taken | (goes[:, None] & (jnp.arange(b) == number[:, None]))
    asked = jnp.sum(taken, axis=1)
    heat = multimask.average_sums(total, peak, hidden, jnp.maximum(asked, 1.0), **averaging).heat
    top_yx, ratio = _top_and_margin(heat, apart=patch)
    pushed = jnp.concatenate([top_yx[:, None], state.tops_yx[:, :-1]], axis=1)
    tops_yx = jnp.where(goes[:, None, None], pushed, state.tops_yx)
    moved = jnp.max(jnp.abs(tops_yx[:, 1:] - tops_yx[:, :1]), axis=(1, 2))
    settled = (asked >= rule.least) & (ratio > rule.margin) & (moved <= max(1, patch // 4))
    active = goes & ~settled & (asked < rule.most)
    return _State(total, peak, hidden, taken, tops_yx, active), bank, step + 1

  shapes = jax.eval_shape(
    passes,
    (
      jnp.zeros(n, jnp.int32),
      jnp.zeros(n, jnp.int32),
      jax.tree.map(lambda x: x[:1, :1].repeat(n, axis=0), bank.clean),
    ),
  )
  total, peak = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  # No peak has lain at such a place, so nothing is settled before it has a past.
  tops_yx = jnp.full((n, rule.still + 1, 2), -(2**20), jnp.int32)
  state = _State(total, peak, jnp.zeros((n, gh, gw)), jnp.zeros((n, b), bool), tops_yx, valid)
  state, bank, _ = jax.lax.while_loop(
    lambda carry: jnp.any(carry[0].active), advance, (state, bank, jnp.int32(0))
  )
  asked = jnp.sum(state.taken, axis=1)
  response = multimask.average_sums(
    state.total, state.peak, state.hidden, jnp.maximum(asked, 1.0), **averaging
  )
  answer = flow.read_out(response, points_xy, middle=perturb.middle(mark), **reading)
  return answer, jnp.where(valid, asked, 0), bank


def _worth(
  masks: Bool[Array, "b gh gw"],
  hidden: Float[Array, "n gh gw"],
  row: Int[Array, " n"],
  col: Int[Array, " n"],
) -> Float[Array, "n b"]:
  """What each mask is worth to a point whose peak lies in a patch.

  1 for hiding the patch, and an eighth for each neighbour that it reveals; none for one that was
  never hidden so far, since the part of the response that lies there would stay unknown.

  Args:
    masks: of frame 2, True where hidden.
    hidden: how many of its masks hid a patch, for each point.
    row, col: of the peaks' patches.
  """
  # Beyond the border nothing can be revealed.
  padded = jnp.pad(masks, ((0, 0), (1, 1), (1, 1)), constant_values=True)
  known = jnp.pad(hidden > 0, ((0, 0), (1, 1), (1, 1)))
  points = jnp.arange(len(row))
  worth = padded[:, row + 1, col + 1].T.astype(jnp.float32)
  for i, j in ((i, j) for i in range(3) for j in range(3) if (i, j) != (1, 1)):
    shown = ~padded[:, row + i, col + j].T & known[points, row + i, col + j][:, None]
    worth += shown / 8
  return worth


def _fill(
  predict_fn: multimask.PredictFn,
  frames: Array,
  masks: Array,
  bank: Bank,
  pair_of: Array,
  number: Array,
  active: Array,
  *,
  chunk: int,
) -> Bank:
  """The bank with what the active points need of it; what is known is not worked out again."""
  p, b = bank.known.shape
  asked = jnp.zeros((p, b), bool).at[pair_of, number].max(active)
  needed = (asked & ~bank.known).reshape(-1)
  # No more than one a point can be missing.
  first = jnp.argsort(~needed)[: min(len(pair_of), p * b)]

  def predict(item):
    made = predict_fn(frames[item // b], masks[item % b])
    return made._replace(tokens=made.tokens if bank.clean.tokens is not None else None)

  made = multimask.map_chunks(predict, first, needed[first], chunk=chunk)
  where = jnp.where(needed[first], first, p * b)

  def put(old, new):
    flat = old.reshape(p * b, *old.shape[2:])
    # One place alone is no scatter to XLA but a choice between two banks: a second one is dropped.
    places, new = jnp.append(where, p * b), jnp.concatenate([new, new[:1]])
    return flat.at[places].set(new, mode="drop").reshape(old.shape)

  made = jax.lax.stop_gradient(made)
  return Bank(jax.tree.map(put, bank.clean, made), bank.known | asked)


def _top_and_margin(heat: Float[Array, "n h w"], *, apart: int) -> tuple[Array, Array]:
  """(row, column) of the highest pixel, and by what factor it tops those further than `apart`."""
  top_yx = geometry.argmax_yx(heat)
  near = geometry.near(top_yx, heat.shape[1:], radius=apart)
  rival = jnp.max(jnp.where(near, 0.0, heat), axis=(1, 2))
  return top_yx, jnp.max(heat, axis=(1, 2)) / jnp.maximum(rival, 1e-12)

"""Many marks in one pass: the flow of a whole grid of points for the passes of a few.

Well-separated marks hardly disturb each other, so one marked frame may carry many; what has to be
found out is which response belongs to which mark. The grid is cut into as many blocks as there are
marks in a pass. In every round each block is dealt out anew, one point of it to each marked frame,
under a new mask: a point meets other companions every time, and the geometric mean over its rounds
keeps what came every time. Then neighbours, which move alike more often than not, vote: each adds
its own response, moved to where this point would be if both moved alike.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from cwm_jax.counterfactual import flow, multimask, perturb
from cwm_jax.counterfactual import masks as masks_lib
from cwm_jax.types import InputError, Response

# What counts as nothing, as a share of a mark's own height.
_FLOOR = 0.002


class Settings(NamedTuple):
  """How a grid is asked about.

  blocks: (rows, columns) of blocks; their product is the number of marks in a pass.
  rounds: marked passes in which each point takes part.
  votes:  width (standard deviation) of the neighbours' votes, in patches; 0 lets nobody vote.
  """

  blocks: tuple[int, int] = (4, 4)
  rounds: int = 10
  votes: float = 1.0


def blocks(marks: int, grid_hw: tuple[int, int]) -> tuple[int, int]:
  """Rows and columns of that many blocks, as even and then as square as the grid allows.

  Raises:
    InputError: the grid has not so many points, or cannot be cut so.
  """
  rows, cols = grid_hw
  fits = [
    (marks // across, across)
    for across in range(1, marks + 1)
    if marks % across == 0 and across <= cols and marks // across <= rows
  ]
  if not fits:
    raise InputError(f"a grid of {rows} x {cols} points cannot have {marks} marks in a pass")
  squareness = lambda cut: abs(np.log(rows / cut[0]) - np.log(cols / cut[1]))  # noqa: E731
  return min(fits, key=lambda cut: (_block_size(grid_hw, cut), squareness(cut)))


def bytes_a_point(image_hw: tuple[int, int]) -> int:
  """Memory that a point of a grid takes: as measured, eight maps of the predictor's size."""
  return 8 * 4 * image_hw[0] * image_hw[1]


def parts(grid_hw: tuple[int, int], most: float) -> list[tuple[slice, slice]]:
  """Grids of at most so many points that make up a grid; each takes every n-th row and column."""
  every = max(1, math.ceil(math.sqrt(grid_hw[0] * grid_hw[1] / max(most, 1))))
  rows, cols = (range(min(every, size)) for size in grid_hw)
  return [(slice(i, None, every), slice(j, None, every)) for i in rows for j in cols]


def step_yx(
  points_xy: Float[np.ndarray, "gy gx 2"], from_hw: tuple[int, int], to_hw: tuple[int, int]
) -> tuple[float, float]:
  """From one row and one column of a grid to the next, in an image of another size.

  Args:
    points_xy: the grid, pixels of an image of size `from_hw`.
  """
  steps = np.diff(points_xy[:, 0, 1]), np.diff(points_xy[0, :, 0])
  down, right = (
    float(step[0]) * to / of if step.size else float(to)
    for step, to, of in zip(steps, to_hw, from_hw)
  )
  return down, right


def num_passes(grid_hw: tuple[int, int], settings: Settings) -> int:
  """Passes that a grid of so many rows and columns of points costs: marked ones and clean ones."""
  return settings.rounds * (_block_size(grid_hw, settings.blocks) + 1)


def deal(grid_hw: tuple[int, int], settings: Settings, *, seed: int) -> Int[np.ndarray, "r s k"]:
  """Which points are marked together.

  Args:
    grid_hw: rows and columns of points.
    seed: of the dealing.

  Returns:
    For each round and marked frame the points' numbers, row by row; -1 where a block, being smaller
    than others, has none left. Every round holds every point once.

  Raises:
    InputError: settings that cannot be.
  """
  check(settings)
  numbers = np.arange(grid_hw[0] * grid_hw[1]).reshape(grid_hw)
  blocks = [
    part.ravel()
    for band in np.array_split(numbers, settings.blocks[0], axis=0)
    for part in np.array_split(band, settings.blocks[1], axis=1)
  ]
  size = _block_size(grid_hw, settings.blocks)
  out = np.full((settings.rounds, size, len(blocks)), -1, np.int32)
  random = np.random.default_rng([seed, 3])
  for this_round in out:
    for k, block in enumerate(blocks):
      this_round[random.permutation(size)[: len(block)], k] = block
  return out


def check(settings: Settings) -> None:
  """Raises InputError where settings cannot be."""
  if min(*settings.blocks, settings.rounds) < 1 or settings.votes < 0:
    raise InputError(
      f"blocks {settings.blocks} and rounds {settings.rounds} are 1 or more, votes "
      f"{settings.votes} 0 or more"
    )


def flow_grid(
  predict_fn: multimask.PredictFn,
  mark: Any,
  frames: Float[Array, "2 h w 3"],
  masks: Bool[Array, "r 2 gh gw"],
  dealt: Int[Array, "r s k"],
  points_xy: Float[Array, "gy gx 2"],
  *,
  step_yx: tuple[float, float],
  votes: float,
  chunk: int,
  **reading: Any,
) -> tuple[Float[Array, "gy gx 2"], Float[Array, "gy gx"]]:
  """Destinations of an even grid of points.

  Memory grows with the number of points times the pixels of the predictor's image.

  Args:
    predict_fn, mark: see `flow.flow_points`.
    frames: one normalised pair.
    masks: one for each round.
    dealt: from `deal`.
    points_xy: the grid, continuous (x, y), pixels of the predictor's image.
    step_yx: from one row and from one column of it to the next, the same pixels.
    votes: of `Settings`.
    chunk: passes that run together.
    **reading: of `flow.read_out`.

  Returns:
    xy [gy, gx, 2], pixels of the predictor's image, and confidence [gy, gx] as `flow.read_out`
    has it, of the votes. Whether a point is seen in frame 2 cannot be told.
  """
  rows, cols = points_xy.shape[:2]
  flat = points_xy.reshape(-1, 2)
  patch = frames.shape[1] // masks.shape[2]
  size = dealt.shape[1]
  per_step = min(chunk, size)

  def one_round(carry, xs):
    mask, sets = xs
    clean = predict_fn(frames[None], mask[None])
    tokens = clean.tokens[0] if perturb.reads_token(mark) else None
    place = _place_of(sets, len(flat))

    def some(part):
      marked, colours = jax.vmap(lambda s: _mark_set(mark, frames[0], tokens, flat, s))(part)
      diff = (
        multimask.marked_predictions(
          predict_fn,
          marked[:, None],
          jnp.broadcast_to(frames[1], marked.shape),
          jnp.broadcast_to(mask, (len(part), 1, *mask.shape)),
        )[:, 0]
        - clean.image
      )
      along = jnp.maximum(jnp.einsum("shwc,skc->skhw", diff, colours), 0.0)
      return jnp.log1p(along / _FLOOR)

    logs = multimask.map_chunks(some, sets, jnp.ones(size, bool), chunk=per_step)
    total, hidden = carry
    return (total + logs.reshape(-1, *logs.shape[2:])[place], hidden + mask[1]), None

  h, w = frames.shape[1:3]
  start = (jnp.zeros((len(flat), h, w)), jnp.zeros(masks.shape[2:]))
  (total, hidden), _ = jax.lax.scan(one_round, start, (masks, dealt))
  # One more than there were: what was hidden once or twice only has proved less.
  times = masks_lib.patches_to_pixels(hidden + 1.0, patch)
  heat = jnp.expm1(total / times).reshape(rows, cols, h, w)
  if votes:
    heat = vote(heat, step_yx=step_yx, sigma=votes * patch)
  response = Response(heat, jnp.zeros((rows, cols)))
  answer = flow.read_out(response, points_xy, middle=perturb.middle(mark), **reading)
  return answer.xy, answer.confidence


def vote(
  heat: Float[Array, "gy gx h w"], *, step_yx: tuple[float, float], sigma: float
) -> Float[Array, "gy gx h w"]:
  """Each point's response and those of its neighbours, moved along, weighted by their distance.

  Args:
    heat: responses of a grid of points; each point has one vote, whatever its height.
    step_yx: from one row and from one column of points to the next, pixels of the heat.
    sigma: width of the weights, pixels of the heat.
  """
  heat = heat / jnp.maximum(jnp.max(heat, axis=(2, 3), keepdims=True), 1e-12)
  for axis, step in enumerate(step_yx):
    reach = min(int(1.5 * sigma / step), heat.shape[axis] - 1)
    away = np.arange(-reach, reach + 1)
    weight = np.exp(-0.5 * (away * step / sigma) ** 2)
    # A neighbour lies `away` steps on, so its response moves as many steps back; between two pixels
    # it is shared between them.
    whole = np.floor(away * step).astype(int)
    share = away * step - whole
    taps = (
      np.concatenate([away, away]),
      np.concatenate([whole, whole + 1]),
      np.concatenate([weight * (1 - share), weight * share]).astype(np.float32),
    )
    heat = _sum_shifted(heat, axis, *taps)
  return heat


def _sum_shifted(x: Array, axis: int, away: Any, pixels: Any, weight: Any) -> Array:
  """Sum of weight * x[i + away, ..., j + pixels], along `axis` and the map's; 0 beyond borders.

  One tap at a time, so that memory does not grow with their number.
  """
  reach, margin = int(np.abs(away).max()), int(np.abs(pixels).max())
  pad = [(0, 0)] * 4
  pad[axis], pad[axis + 2] = (reach, reach), (margin, margin)
  padded = jnp.pad(x, pad)

  def add(total, tap):
    start = [0] * 4
    start[axis], start[axis + 2] = tap[0] + reach, tap[1] + margin
    return total + tap[2] * jax.lax.dynamic_slice(padded, start, x.shape), None

  return jax.lax.scan(add, jnp.zeros_like(x), (away, pixels, weight))[0]


def _block_size(grid_hw: tuple[int, int], blocks: tuple[int, int]) -> int:
  """Points of the largest block."""
  return -(-grid_hw[0] // blocks[0]) * -(-grid_hw[1] // blocks[1])


def _place_of(sets: Int[Array, "s k"], count: int) -> Int[Array, " count"]:
  """Where each point stands in the flattened sets."""
  flat = sets.reshape(-1)
  where = jnp.where(flat < 0, count, flat)
  return (
    jnp.zeros(count, jnp.int32).at[where].set(jnp.arange(len(flat), dtype=jnp.int32), mode="drop")
  )


def _mark_set(mark, first, tokens, points_xy, numbers) -> tuple[Array, Array]:
  """Frame 1 [h, w, 3] with the marks of some points, and what picks out each one's response.

  The latter, [k, 3], is a mark's colour such that its product with what the mark adds at its
  strongest is 1.
  """
  gh, gw = (1, 1) if tokens is None else tokens.shape[:2]
  cell_yx = jnp.array([gh, gw]) / jnp.array(first.shape[:2])

  def add(frame, number):
    point = points_xy[number]
    row, col = jnp.clip((point[::-1] * cell_yx).astype(jnp.int32), 0, jnp.array([gh, gw]) - 1)
    token = None if tokens is None else tokens[row, col]
    colour, height = multimask.mark_colours(mark(first, point, token) - first)
    colour = colour / jnp.maximum(height, 1e-12)
    there = number >= 0
    return jnp.where(there, mark(frame, point, token), frame), jnp.where(there, colour, 0.0)

  return jax.lax.scan(add, first, numbers)

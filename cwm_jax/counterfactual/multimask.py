"""The passes of multi-mask inference: clean and marked predictions, and their averaged difference.

Work is laid out as items (pair, mask) for clean predictions and (point, mask) for marked ones. A
clean prediction is made once and shared by every point of its pair. `plan` is the one place that
decides how many passes go through the predictor at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex_core
from jaxtyping import Array, Bool, Float, Int

from cwm_jax.counterfactual import masks as masks_lib
from cwm_jax.types import InputError, Prediction, Response

PredictFn = Callable[[Array, Array], Prediction]
ToVideo = Callable[[Array], Array]

# Points at once; so that memory does not depend on whether 16 or 256 points are asked about.
_MAX_POINTS = 16

ORDERS = ("release", "paper", "matched")
AVERAGES = ("hidden", "release")


class Plan(NamedTuple):
  """How many passes go through the predictor at once (static under jit).

  clean:  clean passes a step.
  points: points a step of the marked passes, each with `masks` masks.
  masks:  masks a step; a divisor of the number of masks. Below it, `points` is 1.
  """

  clean: int
  points: int
  masks: int


def plan(num_masks: int, *, pass_bytes: float, memory_budget: float, max_passes: int = 64) -> Plan:
  """Turns a byte budget into a chunk size.

  Args:
    num_masks: masks a point is asked under.
    pass_bytes: peak working memory of one pass (see `measure_pass_bytes`).
    memory_budget: bytes that the passes in flight may take together.
    max_passes: more passes than this at once bring no more speed, only cost memory.

  Raises:
    InputError: the budget is below one pass.
  """
  if memory_budget < pass_bytes:
    raise InputError(
      f"a memory budget of {memory_budget / 2**20:.1f} MiB is below one pass of this predictor, "
      f"about {pass_bytes / 2**20:.1f} MiB; raise memory_budget"
    )
  passes = max(1, min(max_passes, int(memory_budget // pass_bytes)))
  if passes >= num_masks:
    points = min(passes // num_masks, _MAX_POINTS)
    return Plan(clean=passes, points=points, masks=num_masks)
  masks = max(d for d in range(1, passes + 1) if num_masks % d == 0)
  return Plan(clean=passes, points=1, masks=masks)


def measure_pass_bytes(
  predict_fn: PredictFn, image_hw: tuple[int, int], grid_hw: tuple[int, int]
) -> float:
  """Working memory that one more pass in a batch takes, in bytes; parameters do not count.

  Read from the traced program without compiling it: twice its widest operation (operands and
  results), as the difference between a batch of two and of one, which takes the parameters out.
  """

  def widest(batch: int) -> int:
    frames = jax.ShapeDtypeStruct((batch, 2, *image_hw, 3), jnp.float32)
    mask = jax.ShapeDtypeStruct((batch, 2, *grid_hw), jnp.bool_)
    return _widest_operation(jax.make_jaxpr(lambda f, m: predict_fn(f, m))(frames, mask).jaxpr)

  frames_bytes = 4 * 2 * 3 * image_hw[0] * image_hw[1]
  return float(max(2 * (widest(2) - widest(1)), frames_bytes))


def _widest_operation(jaxpr: Any) -> int:
  widest = 0
  for eqn in jaxpr.eqns:
    inner = [_widest_operation(sub) for sub in jex_core.jaxprs_in_params(eqn.params)]
    if inner:
      widest = max(widest, *inner)
      continue
    avals = [v.aval for v in (*eqn.invars, *eqn.outvars)]
    widest = max(widest, sum(a.size * a.dtype.itemsize for a in avals if hasattr(a, "size")))
  return widest


def map_chunks(
  fn: Callable[[Any], Any], items: Any, valid: Bool[Array, " n"], *, chunk: int
) -> Any:
  """Applies a batched `fn` to `chunk` items at a time; chunks without a valid item cost nothing.

  Like `jax.lax.map(batch_size=chunk)`, but `fn` sees a real batch, and padding is skipped by a
  branch, so that the compiled program depends on the padded count only.

  Args:
    fn: maps a pytree of [chunk, ...] to a pytree of [chunk, ...].
    items: pytree of [n, ...].
    valid: items that matter; results of the others are zeros or whatever `fn` makes of them.
    chunk: items a step.
  """
  n = valid.shape[0]
  chunk = min(chunk, n)
  steps = -(-n // chunk)

  def split(x):
    x = jnp.concatenate([x, jnp.repeat(x[:1], steps * chunk - n, axis=0)])
    return x.reshape(steps, chunk, *x.shape[1:])

  wanted = jnp.concatenate([valid, jnp.zeros(steps * chunk - n, bool)]).reshape(steps, chunk)
  shapes = jax.eval_shape(fn, jax.tree.map(lambda x: split(x)[0], items))

  def step(args):
    some, batch = args
    nothing = lambda _: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)  # noqa: E731
    return jax.lax.cond(some, fn, nothing, batch)

  out = jax.lax.map(step, (jnp.any(wanted, axis=1), jax.tree.map(split, items)))
  return jax.tree.map(lambda x: x.reshape(steps * chunk, *x.shape[2:])[:n], out)


def clean_predictions(
  predict_fn: PredictFn,
  frames: Float[Array, "p 2 h w 3"],
  masks: Bool[Array, "p m 2 gh gw"],
  valid: Bool[Array, " p"],
  *,
  chunk: int,
  keep_tokens: bool = True,
) -> Prediction:
  """One prediction a (pair, mask): image [p, m, h, w, 3], tokens [p, m, gh, gw, C] or None.

  Args:
    frames: normalised pairs.
    masks: each pair's masks, True where hidden.
    valid: False for pairs that are padding.
    chunk: passes a step.
    keep_tokens: False drops the tokens, which are large, where no mark reads them.
  """

  def predict(item):
    prediction = predict_fn(frames[item[0]], masks[item])
    return prediction if keep_tokens else prediction._replace(tokens=None)

  p, m = masks.shape[:2]
  pair, mask = jnp.repeat(jnp.arange(p), m), jnp.tile(jnp.arange(m), p)
  out = map_chunks(predict, (pair, mask), jnp.repeat(valid, m), chunk=chunk)
  return jax.tree.map(lambda x: x.reshape(p, m, *x.shape[1:]), out)


def cells_yx(
  points_xy: Float[Array, "*n 2"], image_hw: tuple[int, int], grid_hw: tuple[int, int]
) -> Int[Array, "*n 2"]:
  """(row, column) of the grid's cell in which each point lies, pixels of an image of that size."""
  grid = jnp.array(grid_hw)
  index = (points_xy[..., ::-1] * (grid / jnp.array(image_hw))).astype(jnp.int32)
  return jnp.clip(index, 0, grid - 1)


def mark_frames(
  mark: Any,
  first: Float[Array, "n h w 3"],
  tokens: Float[Array, "n m gh gw c"] | None,
  points_xy: Float[Array, "n 2"],
) -> Float[Array, "n k h w 3"]:
  """Each point's frame 1 with its mark; one for all masks where no tokens tell them apart."""
  if tokens is None:
    return jax.vmap(mark, in_axes=(0, 0, None))(first, points_xy, None)[:, None]
  n, _, gh, gw, _ = tokens.shape
  row, col = cells_yx(points_xy, first.shape[1:3], (gh, gw)).T
  # The clean pass is a fixed reference: a learned mark is trained through the marked pass only.
  token = jax.lax.stop_gradient(tokens[jnp.arange(n), :, row, col])
  return jax.vmap(jax.vmap(mark, in_axes=(None, None, 0)))(first, points_xy, token)


def marked_predictions(
  predict_fn: PredictFn,
  marked: Float[Array, "n k h w 3"],
  second: Float[Array, "n h w 3"],
  masks: Bool[Array, "n m 2 gh gw"],
) -> Float[Array, "n m h w 3"]:
  """Predictions of frame 2 from marked first frames (k is m, or 1 for all masks)."""
  n, m = masks.shape[:2]
  shape = (n, m, *second.shape[1:])
  pairs = jnp.stack(
    [jnp.broadcast_to(marked, shape), jnp.broadcast_to(second[:, None], shape)], axis=2
  )
  flat = pairs.reshape(n * m, *pairs.shape[2:])
  return predict_fn(flat, masks.reshape(n * m, *masks.shape[2:])).image.reshape(shape)


def respond(
  predict_fn: PredictFn,
  mark: Any,
  frames: Float[Array, "n 2 h w 3"],
  masks: Bool[Array, "n m 2 gh gw"],
  clean: Prediction,
  points_xy: Float[Array, "n 2"],
  *,
  masks_at_once: int,
  order: str,
  average: str,
  to_video: ToVideo | None = None,
) -> Response:
  """The averaged response of each point: heat [n, h, w], peak [n].

  A prediction is 0 on revealed patches in both passes, so a destination under a revealed patch
  cannot answer in that mask.

  Args:
    frames, masks, clean: those of each point's pair; clean is image [n, m, h, w, 3] and tokens
      [n, m, gh, gw, C] or None.
    points_xy: continuous (x, y), pixels of the predictor's image.
    masks_at_once: a divisor of m; sums are carried over groups of so many masks.
    order: "release" averages the signed difference over masks and then takes the L1 norm over
      channels; "paper" takes the L1 norm first; "matched" takes, of the average, the part that has
      the mark's own colour, and nothing where that is negative.
    average: "hidden" divides each pixel's sum by the number of masks that hide it (0 where none
      does); "release" divides by the number of masks.
    to_video: maps differences [n, h, w, 3] to the pixels that the response is to have; it must be
      linear. None leaves them in the predictor's.

  Raises:
    InputError: an unknown order or average.
  """
  check_averaging(order, average)
  n, m = masks.shape[:2]

  def group(masks_g, clean_g):
    marked = mark_frames(mark, frames[:, 0], clean_g.tokens, points_xy)
    answer = marked_predictions(predict_fn, marked, frames[:, 1], masks_g)
    diff = answer - jax.lax.stop_gradient(clean_g.image)
    colours = None
    if order == "matched":
      colours, _ = mark_colours(marked - frames[:, :1])
    return sum_over_masks(diff, order=order, to_video=to_video, colours=colours)

  if masks_at_once == m:
    sums = group(masks, clean)
  else:

    def split(x):
      return jnp.moveaxis(x.reshape(n, m // masks_at_once, masks_at_once, *x.shape[2:]), 1, 0)

    groups = jax.tree.map(split, (masks, clean))
    shapes = jax.eval_shape(group, *jax.tree.map(lambda x: x[0], groups))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    sums, _ = jax.lax.scan(
      lambda carry, xs: (jax.tree.map(jnp.add, carry, group(*xs)), None), zeros, groups
    )
  return average_over_masks(*sums, masks, order=order, average=average)


def mark_colours(
  change: Float[Array, "*n h w 3"],
) -> tuple[Float[Array, "*n 3"], Float[Array, "*n 1"]]:
  """The colour of what each mark adds where that is strongest, and how much of it that is.

  A colour's largest channel is 1 or -1. The second is the product of the change with it.
  """
  flat = change.reshape(*change.shape[:-3], -1, 3)
  strongest = jnp.argmax(jnp.sum(jnp.abs(flat), axis=-1), axis=-1)
  most = jnp.take_along_axis(flat, strongest[..., None, None], axis=-2)[..., 0, :]
  colour = most / jnp.maximum(jnp.max(jnp.abs(most), axis=-1, keepdims=True), 1e-12)
  return colour, jnp.sum(most * colour, axis=-1, keepdims=True)


def sum_over_masks(
  diff: Float[Array, "n m h w 3"],
  *,
  order: str,
  to_video: ToVideo | None = None,
  colours: Float[Array, "n k 3"] | None = None,
) -> tuple[Float[Array, "n H W *c"], Float[Array, " n"]]:
  """Sums over masks, and of each mask's maximum.

  Args:
    diff: marked minus clean predictions.
    order: says what is summed: "release" the differences, [n, H, W, 3]; "paper" their L1 norms,
      "matched" their parts that have the mark's colour, [n, H, W].
    to_video: see `respond`.
    colours: of each point's marks (k is m, or 1 for all masks), for the order "matched".
  """
  if order == "matched":
    # One channel from here on; resizing is linear.
    diff = jnp.einsum("nmhwc,nmc->nmhw", diff, jnp.broadcast_to(colours, (*diff.shape[:2], 3)))
    diff = diff[..., None]

  def sizes(values):
    size = jnp.sum(jnp.maximum(values, 0.0) if order == "matched" else jnp.abs(values), axis=-1)
    return {"release": values, "paper": size, "matched": values[..., 0]}[order], size

  if to_video is None:
    summed, size = sizes(diff)
    return jnp.sum(summed, axis=1), jnp.sum(jnp.max(size, axis=(-2, -1)), axis=1)

  # The video may be much larger than the predictor's image: one mask's differences at a time.
  def add(total, diff_of_mask):
    summed, size = sizes(to_video(diff_of_mask))
    return jax.tree.map(jnp.add, total, (summed, jnp.max(size, axis=(-2, -1)))), None

  shapes = jax.eval_shape(lambda: add((0.0, 0.0), diff[:, 0])[0])
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  return jax.lax.scan(add, zeros, jnp.moveaxis(diff, 1, 0))[0]


def average_over_masks(
  total: Float[Array, "n h w *c"],
  peak: Float[Array, " n"],
  masks: Bool[Array, "n m 2 gh gw"],
  *,
  order: str,
  average: str,
) -> Response:
  """The response from the sums over all masks; the settings are those of `respond`."""
  hidden = jnp.sum(masks[:, :, 1], axis=1, dtype=jnp.float32)
  asked = jnp.full(masks.shape[:1], float(masks.shape[1]))
  return average_sums(total, peak, hidden, asked, order=order, average=average)


def average_sums(
  total: Float[Array, "n h w *c"],
  peak: Float[Array, " n"],
  hidden: Float[Array, "n gh gw"],
  asked: Float[Array, " n"],
  *,
  order: str,
  average: str,
) -> Response:
  """`average_over_masks`, told of the masks only how many there were.

  The average "hidden" is one of the predictor's pixels; sums in other pixels take "release".

  Args:
    total, peak: sums over masks.
    hidden: how many masks hid each patch.
    asked: how many masks there were.
  """
  times = asked[:, None, None]
  if average == "hidden":
    times = masks_lib.patches_to_pixels(jnp.maximum(hidden, 1.0), total.shape[1] // hidden.shape[1])
  if order == "release":
    return Response(jnp.sum(jnp.abs(total / times[..., None]), axis=-1), peak / asked)
  heat = total / times
  return Response(jnp.maximum(heat, 0.0) if order == "matched" else heat, peak / asked)


def check_averaging(order: str, average: str) -> None:
  """Raises InputError unless both settings of `respond` are known."""
  if order not in ORDERS:
    raise InputError(f"the averaging order is {order!r}; choose one of {', '.join(ORDERS)}")
  if average not in AVERAGES:
    raise InputError(f"the average is {average!r}; choose one of {', '.join(AVERAGES)}")

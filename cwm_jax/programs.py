"""The compiled programs of a training run: a state that is born in its places, and its update.

The loop runs them; `launch/plan` compiles them for devices that need not be there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cwm_jax import optim, sharding
from cwm_jax import step as step_lib
from cwm_jax.types import FramePair, PointLabels, TrainState

_OPTIM = (
  "peak_lr scale_lr schedule final_lr_ratio warmup_from_zero b1 b2 eps weight_decay decay_exclude "
  "freeze clip_norm"
)


class Programs(NamedTuple):
  """What a run computes.

  create: a key to a `TrainState` from scratch. update: (state, pair) to (state, metrics); the state
  given is used up. wanted: shapes of a state, with the places of its arrays. places: those alone.
  """

  create: Callable[[Any], TrainState]
  update: Callable[[TrainState, FramePair], tuple[TrainState, dict[str, Any]]]
  wanted: TrainState
  places: TrainState


def build(
  config: Any, task: Any, mesh: Mesh, *, steps: Callable[[int | str, str], int]
) -> Programs:
  """The programs of a config; nothing is compiled yet.

  Args:
    config: a training job.
    task: see `tasks`.
    mesh: devices.
    steps: a duration of the config and its key to steps.

  Raises:
    InputError: settings of the optimizer or the placement that cannot be used.
  """
  o = config.optim
  tx, rate = optim.make(
    total_steps=steps(config.total, "total"),
    warmup_steps=steps(o.warmup, "optim.warmup"),
    batch_size=config.data.batch_size,
    slow=[(regex, share, steps(wait, "optim.slow")) for regex, share, wait in o.slow],
    **{name: o[name] for name in _OPTIM.split()},
  )
  # Shapes first, then shardings, then arrays born in their places.
  create = partial(step_lib.init_state, task, tx, keep_ema=o.ema_decay > 0)
  abstract = jax.eval_shape(create, jax.random.key(config.seed))
  places = sharding.state_shardings(abstract, config.sharding, mesh)
  wanted = jax.tree.map(
    lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
    abstract,
    places,
  )
  step = step_lib.make_update(
    task, tx, rate, seed=config.seed, accumulate=o.accumulate, ema_decay=o.ema_decay
  )

  def update(state: TrainState, pair: FramePair):
    # Layers that know a better cut than the compiler see what there is to cut for.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return step(state, pair)

  update = jax.jit(
    update,
    in_shardings=(places, sharding.batch_sharding(mesh)),
    out_shardings=(places, sharding.replicated(mesh)),
    donate_argnums=0,
  )
  return Programs(jax.jit(create, out_shardings=places), update, wanted, places)


def pair_shapes(task: Any, count: int, *, place: Any = None) -> FramePair:
  """The shapes of `count` pairs as a task's loss takes them; of points, one a pair.

  Args:
    place: sharding of batches.
  """

  def shape(*sizes: int, dtype: Any = jnp.float32):
    return jax.ShapeDtypeStruct((count, *sizes), dtype, sharding=place)

  pair = FramePair(shape(2, *task.image_hw, 3))
  if task.wants == "truth":
    visible = shape(*task.image_hw, dtype=jnp.bool_)
    pair = pair._replace(flow_xy=shape(*task.image_hw, 2), visible=visible)
  elif task.wants == "labels":
    points = PointLabels(shape(1, 2), shape(1, 2), shape(1), shape(1, dtype=jnp.bool_), shape(1))
    pair = pair._replace(labels=points)
  return pair

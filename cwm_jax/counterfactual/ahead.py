"""Programs compiled before the first question, from the shapes of questions alone.

An engine runs its programs by its attribute `run`. Here a copy of it is asked the questions to come
with a `run` that compiles instead, so that what is compiled is what an answer takes. JAX finds the
programs again when they are called with the same shapes and settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np


def call(program: Callable[..., Any], *args: Any, **settings: Any) -> Any:
  """What an engine's `run` is when it answers."""
  return program(*args, **settings)


def compile_questions(
  engine: Any, pair: tuple[Any, Any], video_hw: tuple[int, int], *, counts: Iterable[tuple]
) -> list[jax.stages.Compiled]:
  """Compiles what an engine runs for questions of some sizes, and computes nothing.

  Args:
    engine: a copy of the one that answers, which may be at it in another thread; is asked for
      `parts`.
    pair: of frames, as the engine prepares them, `jax.ShapeDtypeStruct`s for arrays.
    video_hw: the size of the frames as given.
    counts: (pairs, points) that are asked about at once.

  Returns:
    The programs, each one once.
  """
  programs: dict[Any, jax.stages.Compiled] = {}

  def compile_only(program: Any, *args: Any, **settings: Any) -> Any:
    shapes, tree = jax.tree.flatten(jax.eval_shape(lambda *given: given, *args))
    key = (program, tree, *shapes, *sorted(settings.items()))
    lowered = program.lower(*args, **settings)
    if key not in programs:
      programs[key] = lowered.compile()
    return jax.tree.map(lambda made: jax.ShapeDtypeStruct(made.shape, made.dtype), lowered.out_info)

  engine.run = compile_only
  for pairs, points in counts:
    pair_of, points_xy = np.arange(points) % pairs, np.zeros((points, 2), np.float32)
    for _ in engine.parts([pair] * pairs, pair_of, points_xy, video_hw):
      pass
  return list(programs.values())


def counts_to_ask(
  buckets: Iterable[int], *, points: int | None, pairs: int, pairs_at_once: int
) -> list[tuple[int, int]]:
  """The (pairs, points) of an engine's questions about `points` points of each of `pairs` pairs.

  Args:
    buckets: numbers of points that have a program, for any number of points, which is None.
    pairs_at_once: the most that are asked about together.
  """
  # A video's queries begin one after the other, so that fewer pairs come before more.
  groups = sorted({1, min(pairs, pairs_at_once), pairs % pairs_at_once} - {0})
  if points is None:
    return [(group, bucket) for group in groups for bucket in buckets]
  return [(group, group * points) for group in groups]

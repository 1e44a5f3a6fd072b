"""The sides that `launch/bench track` compares: ours, and the public code's or its schedule."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from cwm_jax import models
from cwm_jax.configs import base, opt_cwm
from cwm_jax.counterfactual import compiled, gaussian, masks, multimask
from cwm_jax.models.perturber import Perturber
from cwm_jax.pretrained import convert, keymaps
from cwm_jax.tracker import Tracker
from cwm_jax.types import InputError

MASK_RATIO = 0.9
PUBLIC = Path(__file__).with_name("torch_track.py")


class Question(NamedTuple):
  """What every side is asked: frames uint8 [2, H, W, 3], points_xy float32 [N, 2]."""

  frames: np.ndarray
  points_xy: np.ndarray

  def first(self) -> Question:
    """The question about the first point alone."""
    return self._replace(points_xy=self.points_xy[:1])


class Answer(NamedTuple):
  """What a side said and what it took.

  xy: float32 [N, 2], bare (x, y) indices.
  passes: through the network, padding of batches included.
  cpu_seconds: of all threads; what other work on the machine takes does not count.
  grown, peak: bytes of memory in use, by how much it grew at most and all of it at most; of the
    device where it tells, else of the process.
  """

  xy: np.ndarray
  passes: int
  cpu_seconds: float
  grown: int
  peak: int


Side = Callable[[Question], Answer]


class Network(NamedTuple):
  """One network with random weights, and how large it is.

  model: a job config's "model" section.
  scale: how many times larger than at 256 pixels its marks are drawn.
  """

  model: dict[str, Any]
  scale: int
  predict: Partial
  passes: Callable[[], int]
  mark: Partial


class Counted:
  """Applies a model and counts the passes that are run, padding of batches included."""

  def __init__(self, model: Any, num_visible: int):
    self.model, self.num_visible, self.passes = model, num_visible, 0

  def __call__(self, params: Any, frames: Any, mask: Any) -> Any:
    jax.debug.callback(self._add, mask)
    return self.model.apply({"params": params}, frames, mask, num_visible=self.num_visible)

  def _add(self, mask: Any) -> None:
    self.passes += len(mask)

  def total(self) -> int:
    jax.effects_barrier()
    return self.passes


class Peak(threading.Thread):
  """Samples the memory in use while its block runs: `before` it, and `bytes` at most in it."""

  def __init__(self):
    super().__init__(daemon=True)
    self._done, self.before = threading.Event(), _bytes_in_use()
    self.bytes = self.before

  def run(self):
    while not self._done.wait(0.002):
      self.bytes = max(self.bytes, _bytes_in_use())

  def __enter__(self):
    self.start()
    return self

  def __exit__(self, *_):
    self._done.set()
    self.join()


def _bytes_in_use() -> int:
  stats = jax.local_devices()[0].memory_stats()
  if stats:
    return stats["bytes_in_use"]
  with open("/proc/self/statm") as file:
    return int(file.read().split()[1]) * 4096


def build(options: argparse.Namespace) -> Network:
  """The network that the options name."""
  model = dict(base.get_config().model) | opt_cwm.model(options.model or "opt-cwm-256")
  if not options.model:
    model |= dict(image_hw=(options.image, options.image), positions_hw=())
    for part in ("encoder", "decoder"):
      model |= {
        f"{part}_width": options.width,
        f"{part}_depth": options.depth,
        f"{part}_heads": options.heads,
      }
  model["dtype"] = options.dtype
  (h, w), patch = model["image_hw"], model["patch"]
  grid_hw = (h // patch, w // patch)
  visible = masks.num_visible_patches(grid_hw, MASK_RATIO)
  # The released masking replaces tokens and needs no number of visible ones.
  counted = Counted(models.build(model), grid_hw[0] * grid_hw[1] + visible)
  keys = jax.random.split(jax.random.key(0), 3)
  mask = masks.sample_masks(keys[0], grid_hw, visible, (1,))
  init = partial(counted.model.init, num_visible=counted.num_visible)
  shapes = jax.eval_shape(init, keys[1], np.zeros((1, 2, h, w, 3), np.float32), mask)["params"]
  perturber = Perturber(hidden_width=opt_cwm.PERTURBER["hidden_width"])
  scale = opt_cwm.MARK_SCALES.get(options.model, 1)
  mark = gaussian.GaussianMark(perturber, size=opt_cwm.PERTURBER["size"], scale=scale)
  marks = jax.eval_shape(perturber.init, keys[2], np.zeros(model["encoder_width"], np.float32))
  predict = Partial(counted, _fill(shapes, seed=0))
  return Network(
    model, scale, predict, counted.total, Partial(mark, _fill(marks["params"], seed=1))
  )


def _fill(shapes: Any, *, seed: int) -> Any:
  """Random parameters, of which none is left out: as they are born, marks hardly show."""
  rng = np.random.default_rng(seed)

  def fill(path, leaf):
    values = rng.standard_normal(leaf.shape, np.float32)
    name = path[-1].key
    if name == "kernel":
      return jnp.asarray(values / np.float32(leaf.shape[-2] ** 0.5))
    if name == "scale":
      return jnp.asarray(1 + values / 5)
    return jnp.asarray(values / (10 if name == "bias" else 2))

  return jax.tree_util.tree_map_with_path(fill, shapes)


def ours(network: Network, options: argparse.Namespace, *, one_by_one: bool = False) -> Side:
  """Our tracker; `one_by_one` with the release's schedule, a point and a pass at a time."""
  image_hw, patch = network.model["image_hw"], network.model["patch"]
  budget = None
  if one_by_one:
    # A budget of one pass leaves room for no more than one at a time.
    grid_hw = tuple(n // patch for n in image_hw)
    budget = multimask.measure_pass_bytes(network.predict, image_hw, grid_hw)
  tracker = Tracker(
    network.predict,
    image_hw=image_hw,
    patch=patch,
    mask_ratio=MASK_RATIO,
    num_masks=options.masks,
    zoom=options.zoom,
    mark=network.mark,
    protocol="release",
    memory_budget=budget,
  )

  def answer(question: Question) -> Answer:
    groups = [question.points_xy]
    if one_by_one:
      groups = np.split(question.points_xy, len(question.points_xy))
    before, began = network.passes(), time.process_time()
    with Peak() as peak:
      found = [tracker.flow(*question.frames, points).xy for points in groups]
    passes = network.passes() - before
    took = time.process_time() - began
    return Answer(np.concatenate(found), passes, took, peak.bytes - peak.before, peak.bytes)

  return answer


@contextlib.contextmanager
def public(
  network: Network, options: argparse.Namespace, question: Question
) -> Iterator[tuple[Side, str]]:
  """The public code with the network's weights and masks, and the versions it runs with.

  It is told the question once, before anything is timed.

  Raises:
    InputError: it does not start.
  """
  (h, w), patch = network.model["image_hw"], network.model["patch"]
  drawn = compiled.make_masks(
    0, grid_hw=(h // patch, w // patch), mask_ratio=MASK_RATIO, num_masks=options.masks, zoom=0
  )
  rules = convert.Naming(predictor="cwm_model.", perturber="perturber.").rules()
  params = network.predict.args[0] | {"perturber": network.mark.args[0]}
  sizes = {
    f"{half}_{theirs}": network.model[f"{half}_{ours}"]
    for half in ("encoder", "decoder")
    for theirs, ours in (("embed_dim", "width"), ("depth", "depth"), ("num_heads", "heads"))
  }
  settings = dict(
    base_cwm=sizes | dict(img_size=h // network.scale, patch_size=[patch, patch]),
    flow_predictor=dict(masking_iters=options.masks, masking_ratio=MASK_RATIO, zoom_iters=0),
  )
  threads = len(os.sched_getaffinity(0))
  with tempfile.TemporaryDirectory(prefix="cwm-race-") as folder:
    place = Path(folder)
    place.joinpath("settings.json").write_text(
      json.dumps(dict(model=settings, highres=network.scale > 1))
    )
    np.savez(place / "state.npz", **keymaps.to_state(params, rules))
    np.savez(
      place / "question.npz",
      frames=question.frames,
      points_yx=np.floor(question.points_xy[:, ::-1]).astype(np.int64),
      masks=np.asarray(drawn[0]).reshape(options.masks, -1),
    )
    command = [options.torch_python, PUBLIC, options.torch, folder, str(threads)]
    try:
      process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    except OSError as error:
      raise InputError(f"{options.torch_python} does not run: {error}") from None
    with process:
      try:
        yield _asks(process, options.torch_batch or options.points), _read(process)["versions"]
      finally:
        process.terminate()


def _asks(process: subprocess.Popen, batch: int) -> Side:
  def answer(question: Question) -> Answer:
    asked = dict(batch=batch, points=len(question.points_xy))
    process.stdin.write(json.dumps(asked) + "\n")
    process.stdin.flush()
    told = _read(process)
    xy = np.array(told["points_yx"], np.float32)[:, ::-1]
    return Answer(xy, *(told[name] for name in Answer._fields[1:]))

  return answer


def _read(process: subprocess.Popen) -> dict[str, Any]:
  line = process.stdout.readline()
  if not line:
    raise InputError(
      "the public code ended without an answer; what it said stands above (its Python needs torch "
      "and what the code imports: see --help)"
    )
  return json.loads(line)

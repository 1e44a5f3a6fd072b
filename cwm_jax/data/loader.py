"""Batches for training: sources mixed by weight, read in order, resumed exactly, put on devices.

Global batch k holds the same examples in the same order, whatever the number of processes and
workers. It comes from one source, drawn from (seed, k); that source's stream goes on where its last
batch ended. So the state of a loader is one number, and a run can be resumed with other processes
and workers.
"""

from __future__ import annotations

import json
import os
import re
import threading
import zlib
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

import grain.python as grain
import jax
import numpy as np
from absl import flags, logging
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from cwm_jax import supervision
from cwm_jax.data import procedural
from cwm_jax.data.labels import LabelsSource
from cwm_jax.data.sources import (
  ENDLESS,
  FrameFolderSource,
  ScenesSource,
  Source,
  VideoSource,
)
from cwm_jax.types import InputError

Batch = dict[str, np.ndarray]
Settings = ConfigDict | Mapping[str, Any]

_DRAWS_A_BLOCK = 4096
_WORKER_LIVES = 3  # how often workers are started for the same batch


class Mixture(grain.DatasetSelectionMap):
  """Which source batch k comes from, and which of its batches that is.

  Sources are drawn independently with the given weights, in blocks, so that any k is found quickly.
  """

  def __init__(self, weights: Sequence[float], seed: int):
    self._edges = np.cumsum(np.asarray(weights, np.float64) / np.sum(weights))[:-1]
    self._seed, self._sources = seed, len(weights)
    self._before = [np.zeros(self._sources, np.int64)]  # batches of each source before each block
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return ENDLESS

  def __getitem__(self, index: int) -> tuple[int, int]:
    block, place = divmod(index, _DRAWS_A_BLOCK)
    with self._lock:
      while len(self._before) <= block:
        drawn = self._draw(len(self._before) - 1)
        counts = np.bincount(drawn, minlength=self._sources)
        self._before.append(self._before[-1] + counts)
    drawn = self._draw(block)
    source = int(drawn[place])
    return source, int(self._before[block][source] + np.sum(drawn[:place] == source))

  def _draw(self, block: int) -> np.ndarray:
    coins = np.random.default_rng([self._seed, block]).random(_DRAWS_A_BLOCK)
    return np.searchsorted(self._edges, coins, side="right")

  def __getstate__(self) -> dict[str, Any]:
    return {name: value for name, value in self.__dict__.items() if name != "_lock"}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._lock = threading.Lock()


class Loader(grain.DatasetIterator):
  """An endless iterator of this process's batches; Orbax can save and restore it.

  Args:
    batches: an endless Grain dataset of batches that hold "skipped" int32 [b].
    num_workers: processes that read; 0 reads in threads of this one.
    prefetch: batches made ahead (for each worker); 0 makes them when asked for.
    epoch_examples: examples in an epoch, 0 when endless.
  """

  def __init__(
    self, batches: grain.MapDataset, *, num_workers: int, prefetch: int, epoch_examples: int
  ):
    super().__init__()
    self.epoch_examples = epoch_examples
    self._dataset, self._num_workers, self._prefetch = batches, num_workers, prefetch
    self._next, self._skipped = 0, 0
    self._batches: Iterator[Batch] | None = None

  def __next__(self) -> Batch:
    batch = dict(self._fetch())
    self._skipped += int(np.sum(batch.pop("skipped")))
    self._next += 1
    return batch

  def _fetch(self) -> Batch:
    """The next batch, from new workers where the old ones died: the stream is a matter of place."""
    for _ in range(_WORKER_LIVES):
      if self._batches is None:
        self._batches = self._start()
      try:
        return next(self._batches)
      except RuntimeError as error:
        if "terminated unexpectedly" not in str(error):
          raise
        code = re.search(r"exit code (-?\d+)", str(error))
        told = f"exit code {code[1]}" if code else "no exit code"
        logging.warning("a data worker died at batch %d (%s); starting anew", self._next, told)
        self._stop()
    raise InputError(
      f"data workers died {_WORKER_LIVES} times over batch {self._next}, the last with {told}; "
      "exit code -9 is mostly the system's, for want of memory: take fewer data.num_workers"
    )

  def first(self) -> Batch:
    """The stream's first batch, read in this process; its place stays as it is."""
    batch = dict(self._dataset[0])
    del batch["skipped"]
    return batch

  def skipped(self) -> int:
    """Broken items passed over so far by this process, earlier runs included."""
    return self._skipped

  def get_state(self) -> dict[str, int]:
    place = {"next_batch": self._next, "skipped": self._skipped}
    return {**place, "check": _check(place)}

  def set_state(self, state: Mapping[str, int]) -> None:
    """Goes on at a place saved before. Raises InputError if it is damaged."""
    place = {name: int(state[name]) for name in ("next_batch", "skipped")}
    if state.get("check", _check(place)) != _check(place):  # places of old have none
      raise InputError(f"the saved place in the data is damaged: {dict(state)}")
    self._stop()
    self._next, self._skipped = place["next_batch"], place["skipped"]

  async def load(self, directory: epath.Path) -> Awaitable[None]:
    """As Grain's, but a state saved by any process serves, since all hold the same place."""

    async def load_any() -> None:
      names = sorted(path.name for path in directory.iterdir() if path.suffix == ".json")
      if not names:
        raise InputError(f"{directory} holds no saved state of the data")
      own = f"process_{jax.process_index()}-of-{jax.process_count()}.json"
      state = json.loads((directory / (own if own in names else names[0])).read_text())
      self.set_state(state)
      if own not in names:
        self._skipped = 0

    return load_any()

  def close(self) -> None:
    if not self._closed:
      self._closed = True
      self._stop()

  def _start(self) -> Iterator[Batch]:
    rest = self._dataset[self._next :]
    if self._num_workers:
      # Grain's workers read absl flags, which nobody parses under pytest or in a notebook.
      if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
      options = grain.MultiprocessingOptions(self._num_workers, max(1, self._prefetch))
      ahead = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
      stream = rest.to_iter_dataset(ahead).mp_prefetch(options, worker_init_fn=_begin_worker)
    else:
      ahead = grain.ReadOptions(num_threads=self._prefetch, prefetch_buffer_size=self._prefetch)
      stream = rest.to_iter_dataset(ahead)
    return iter(stream)

  def _stop(self) -> None:
    if self._batches is not None:
      self._batches.close()
      self._batches = None


def make_loader(
  data: Settings,
  *,
  image_hw: tuple[int, int],
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
) -> Loader:
  """Opens the sources that `data.sources` gives a weight to.

  Args:
    data: `config.data`; see configs/base.py.
    image_hw: pixels of the frames handed out.
    seed: of order, crops, times and the mixture; 0 or more.
    process_index, process_count: this process's share; it gets the process_index-th of
      process_count equal runs of each global batch.

  Returns:
    A loader of batches of batch_size / process_count examples: "index" int64 [b], and either
    "scene/<name>" [b, ...] or "frames" uint8 [b, 2, H, W, 3], of labels with "labels/<name>".

  Raises:
    InputError: no source has a weight, a weight or the seed is negative, a source cannot be opened,
      or the batch does not divide by the processes.
  """
  batch_size = data["batch_size"]
  if batch_size < 1 or batch_size % process_count:
    raise InputError(f"a batch of {batch_size} does not divide by {process_count} processes")
  if data["num_workers"] < 0 or data["prefetch"] < 0:
    raise InputError("data.num_workers and data.prefetch must not be negative")
  if seed < 0:
    raise InputError(f"the config's seed is {seed}; it must be 0 or more")
  openers = _openers(data, image_hw=image_hw, seed=seed)
  weights = {name: source["weight"] for name, source in data["sources"].items()}
  for name, weight in weights.items():
    if name not in openers:
      raise InputError(f"unknown data source {name!r}; there are {', '.join(openers)}")
    if not 0 <= weight < float("inf"):
      raise InputError(f"the weight of data source {name!r} is {weight}; it must be 0 or more")
  chosen = {name: weight for name, weight in weights.items() if weight > 0}
  if not chosen:
    raise InputError(f"no data source has a weight above 0; give one to {', '.join(openers)}")
  sources = [openers[name](data["sources"][name]) for name in chosen]
  # Neighbours stay together, so that the global array's order does not depend on the processes
  # either: a pair's mask is drawn by its place in the batch.
  share = batch_size // process_count
  batches = [
    example_stream(source, seed=seed).batch(share, drop_remainder=True)[
      process_index::process_count
    ]
    for source in sources
  ]
  mixture = Mixture(list(chosen.values()), seed)
  return Loader(
    grain.MapDataset.select_from_datasets(batches, mixture),
    num_workers=data["num_workers"],
    prefetch=data["prefetch"],
    epoch_examples=data["epoch_examples"] or _epoch(sources),
  )


def example_stream(source: Source, *, seed: int) -> grain.MapDataset:
  """A source's examples without end: in order when endless, else shuffled anew in each epoch."""
  if not source.items:
    return grain.MapDataset.range(ENDLESS).map_with_index(source.example)
  order = grain.MapDataset.range(source.items).shuffle(seed=seed % 2**32)
  # The length is cut to a whole number of epochs, so that slicing it keeps its order.
  return order.repeat(ENDLESS // source.items).map_with_index(source.example)


def shard_batch(batch: Batch, mesh: Mesh) -> dict[str, jax.Array]:
  """Moves every process's batch onto its devices, as one global array per name.

  The leading axis is split over the mesh axes "data" and "fsdp". int64 becomes int32, JAX's width.

  Raises:
    InputError: the global batch does not divide by the devices.
  """
  sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
  size = len(next(iter(batch.values()))) * jax.process_count()
  devices = mesh.shape["data"] * mesh.shape["fsdp"]
  if size % devices:
    raise InputError(f"a batch of {size} does not divide by {devices} devices")

  def move(array: np.ndarray) -> jax.Array:
    array = array.astype(np.int32) if array.dtype == np.int64 else array
    return jax.make_array_from_process_local_data(sharding, array)

  return {name: move(array) for name, array in batch.items()}


def _openers(
  data: Settings, *, image_hw: tuple[int, int], seed: int
) -> dict[str, Callable[[Settings], Source]]:
  pairs = dict(image_hw=tuple(image_hw), seed=seed, crop=data["crop"], flip=data["flip"])

  def scenes(c: Settings) -> Source:
    return ScenesSource(
      first_seed=c["first_seed"],
      curriculum=c["curriculum"],
      fade=c["fade"],
      max_objects=c["max_objects"],
      photos=c["photos"],
      texture_size=procedural.texture_side(
        c["texture_size"], size_hw=tuple(image_hw), supersample=c["supersample"]
      ),
    )

  def video(c: Settings) -> Source:
    return VideoSource(_named(c, "video"), gap_ms=c["gap_ms"], **pairs)

  def frames(c: Settings) -> Source:
    return FrameFolderSource(_named(c, "frames"), gap=c["gap"], **pairs)

  def tfds(c: Settings) -> Source:
    from cwm_jax.data.tfds_source import TfdsSource  # takes seconds to import

    if not (c["name"] or c["data_dir"]):
      raise InputError("data.sources.tfds has a weight but neither a name nor a data_dir")
    options = {name: c[name] for name in ("split", "data_dir", "feature", "gap")}
    return TfdsSource(c["name"], **options, **pairs)

  def labels(c: Settings) -> Source:
    return LabelsSource(_named(c, "labels"), image_hw=tuple(image_hw))

  return dict(scenes=scenes, video=video, frames=frames, tfds=tfds, labels=labels)


def _named(source: Settings, name: str) -> str:
  if not source["paths"]:
    raise InputError(f"data.sources.{name} has a weight but names no paths")
  return source["paths"]


def _epoch(sources: Sequence[Source]) -> int:
  """Examples in an epoch of a mixture: every item of every source; 0 when one is endless."""
  items = [source.items for source in sources]
  return sum(items) if all(items) else 0


def _check(place: Mapping[str, int]) -> int:
  return zlib.crc32(json.dumps(place, sort_keys=True).encode())


def _begin_worker(worker_index: int, worker_count: int) -> None:
  # Should something reach for a device here after all, it must not be the trainer's.
  jax.config.update("jax_platforms", "cpu")
  threading.Thread(target=supervision.end_with_parent, args=(os.getppid(),), daemon=True).start()

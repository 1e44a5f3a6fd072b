"""Many items over many devices and processes: who does what, and how results come together.

A process takes every n-th item; in it, each local device has a worker (a tracker of its own) in a
thread of its own. Nothing is exchanged until the end.
"""

from __future__ import annotations

import functools
import io
import logging
import queue
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, TypeVar

import jax
import numpy as np

from cwm_jax import processes as processes_lib
from cwm_jax.progress import format_seconds
from cwm_jax.types import InputError

_LOG = logging.getLogger(__name__)
_EVERY_S = 10.0  # between lines of the log that tell how far the work is
_Item = TypeVar("_Item")


class OnDevice:
  """A tracker whose methods run on one device, whichever thread asks."""

  def __init__(self, build: Callable[[], Any], device: jax.Device):
    self._device = device
    self._tracker = self._there(build)

  def __getattr__(self, name: str) -> Callable:
    # Kinds of trackers have different methods, and are asked which.
    return functools.partial(self._there, getattr(self._tracker, name))

  def _there(self, call: Callable, *args: Any, **settings: Any) -> Any:
    with jax.default_device(self._device):
      return call(*args, **settings)


def one_each(build: Callable[[], Any]) -> list[Any]:
  """What `build` makes, once for every device of this process."""
  devices = jax.local_devices()
  if len(devices) == 1:
    return [build()]
  return [OnDevice(build, device) for device in devices]


def my_share(count: int) -> range:
  """Which of `count` items this process does."""
  return range(jax.process_index(), count, jax.process_count())


def is_mine(item: int) -> bool:
  """Whether this process does an item, for streams whose length is not known."""
  return item % jax.process_count() == jax.process_index()


def work_through(
  work: Callable[[Any, int], Any], items: Iterable[int], workers: Sequence[Any]
) -> Iterator[tuple[int, Any]]:
  """(item, work(worker, item)) for every item, as they come; no worker has two items at a time."""
  if len(workers) == 1:
    yield from ((item, work(workers[0], item)) for item in items)
    return
  free: queue.SimpleQueue = queue.SimpleQueue()
  for worker in workers:
    free.put(worker)

  def one(item: int) -> tuple[int, Any]:
    worker = free.get()
    try:
      return item, work(worker, item)
    finally:
      free.put(worker)

  with ThreadPoolExecutor(len(workers)) as pool:
    try:
      for done in as_completed([pool.submit(one, item) for item in items]):
        yield done.result()
    finally:
      pool.shutdown(wait=True, cancel_futures=True)


def logged(items: Iterable[_Item], *, total: int, unit: str) -> Iterator[_Item]:
  """Passes items on and logs now and then how many there were and how long the rest will take.

  Args:
    total: how many are expected; may be a guess.
    unit: what they are, in the plural.
  """
  began = last = time.monotonic()
  for count, item in enumerate(items, start=1):
    yield item
    now = time.monotonic()
    if now - last > _EVERY_S and count < total:
      last = now
      left = format_seconds((now - began) / count * (total - count))
      _LOG.info("  %d/%d %s  eta %s", count, total, unit, left)


def gather(mine: dict[int, bytes], count: int) -> dict[int, bytes]:
  """All processes' results, on every process.

  Args:
    mine: {item: result} of all items of `my_share(count)`.
    count: items of all processes together.
  """
  processes = jax.process_count()
  if processes == 1:
    return mine
  found = {}
  # A round has one item of each process, so that no more than that is ever padded to one length.
  for first in range(0, count, processes):
    own = mine.get(first + jax.process_index(), b"")
    for process, result in enumerate(processes_lib.everyone(own)):
      if first + process < count:
        found[first + process] = result
  return found


def pack(arrays: Mapping[str, np.ndarray]) -> bytes:
  """Named arrays as one result of `gather`."""
  buffer = io.BytesIO()
  np.savez(buffer, **arrays)
  return buffer.getvalue()


def unpack(packed: bytes) -> dict[str, np.ndarray]:
  """What `pack` was given."""
  with np.load(io.BytesIO(packed), allow_pickle=False) as file:
    return dict(file)


def check_same(value: str, *, what: str) -> None:
  """Raises InputError in a process that holds another value than the first one."""
  if processes_lib.of_first_process(value.encode()) != value.encode():
    raise InputError(
      f"process {jax.process_index()} has other {what} than process 0; all must read the same files"
    )

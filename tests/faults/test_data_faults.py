"""Data that dies, vanishes or turns to garbage while it is being read."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal

import numpy as np
import pytest
import tiny_job
from absl import logging

from cwm_jax.data import loader as loader_lib
from cwm_jax.types import InputError


def make(workers):
  data = tiny_job.get_config().data
  data.update(num_workers=workers, prefetch=1)
  return loader_lib.make_loader(data, image_hw=(16, 16), seed=3)


def kill_a_worker(*, before):
  """Kills one of the workers that were not there `before`: another test may have left some."""
  children = set(multiprocessing.active_children()) - before
  workers = [p for p in children if "spawn" in type(p).__name__.lower()]
  assert workers
  os.kill(workers[0].pid, signal.SIGKILL)
  workers[0].join()


def test_a_worker_that_is_killed_is_replaced_and_the_stream_stays_the_same(monkeypatch):
  warnings = []
  monkeypatch.setattr(logging, "warning", lambda text, *values: warnings.append(text % values))
  undisturbed = list(itertools.islice(make(0), 8))
  before = set(multiprocessing.active_children())
  loader = make(1)
  found = list(itertools.islice(loader, 3))
  kill_a_worker(before=before)
  found += itertools.islice(loader, 5)
  loader.close()
  for one, other in zip(found, undisturbed, strict=True):
    assert one.keys() == other.keys()
    for name in one:
      np.testing.assert_array_equal(one[name], other[name])
  assert len(warnings) == 1 and "a data worker died at batch" in warnings[0]
  assert "exit code -9" in warnings[0]


def test_workers_that_die_over_the_same_batch_again_and_again_end_with_a_sentence(monkeypatch):
  loader = make(1)
  starts = []

  def start(self):
    starts.append(1)

    def dies():
      raise RuntimeError("Worker process was terminated unexpectedly with exit code -9. Search")
      yield

    return dies()

  monkeypatch.setattr(loader_lib.Loader, "_start", start)
  with pytest.raises(InputError, match=r"died 3 times over batch 0, .*exit code -9"):
    next(loader)
  assert len(starts) == 3


def test_a_saved_place_with_a_flipped_digit_is_refused():
  loader = make(0)
  state = loader.get_state()
  loader.set_state(state)
  with pytest.raises(InputError, match="damaged"):
    loader.set_state({**state, "next_batch": 8})
  # Places saved before there was a check have none.
  loader.set_state({"next_batch": 2, "skipped": 0})
  assert loader.get_state()["next_batch"] == 2

"""A labelling job small enough for tests: 10 pairs of 16 x 16 pixels, by a tracker that says 0."""

from __future__ import annotations

from pathlib import Path

from cwm_jax.configs import label
from cwm_jax.data import labels


def get_config(arg: str = ""):
  c = label.get_config("runlocal")
  c.label.update(tracker="zero", pairs=10, points=3, shard_pairs=4, image_hw=(16, 16))
  c.data.batch_size = 2
  c.data.sources.scenes.update(max_objects=1, curriculum=((0, "shifts"),))
  return c


def records(workdir: Path) -> list[dict]:
  """All records of a workdir's shards, in the order of shards."""
  from array_record.python.array_record_module import ArrayRecordReader

  found = []
  for path in labels.find_shards(workdir):
    reader = ArrayRecordReader(str(path))
    found += [labels.decode(data) for data in reader.read_all()]
  return found

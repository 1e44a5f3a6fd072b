"""Records of labels: what goes in comes out, what is damaged is a sentence, training can read."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

from cwm_jax.configs import base
from cwm_jax.data import labels, loader
from cwm_jax.types import InputError


def record(index: int, side: int = 8) -> dict:
  random = np.random.default_rng(index)
  return dict(
    index=np.int64(index),
    pair=random.integers(0, 256, (2, side, side, 3), dtype=np.uint8),
    points_xy=random.random((3, 2), np.float32),
    flow_xy=random.random((3, 2), np.float32),
    confidence=random.random(3, np.float32),
    visible=np.array([True, False, True]),
    round_trip=np.array([0.5, np.inf, 0.0], np.float32),
  )


def write(folder, number: int, count: int, indices, **changes) -> None:
  from array_record.python.array_record_module import ArrayRecordWriter

  writer = ArrayRecordWriter(str(folder / labels.shard_name(number, count)), "group_size:1")
  for index in indices:
    writer.write(labels.encode(record(index) | changes))
  writer.close()


def test_a_record_comes_out_as_it_went_in():
  given, found = record(5), labels.decode(labels.encode(record(5)))
  assert list(found) == list(labels.FIELDS)
  for name in labels.FIELDS:
    np.testing.assert_array_equal(found[name], given[name])
    assert found[name].dtype == given[name].dtype


def test_a_damaged_record_is_a_sentence():
  with pytest.raises(InputError, match="record 3 of x cannot be read"):
    labels.decode(labels.encode(record(0))[:-60], where="record 3 of x")


def test_a_damaged_record_is_passed_over_and_counted(tmp_path):
  write(tmp_path, 0, 1, [0, 1, 2])
  (shard,) = labels.find_shards(tmp_path)
  data = bytearray(shard.read_bytes())
  data[200] ^= 255
  shard.write_bytes(data)
  source = labels.LabelsSource(tmp_path, image_hw=(8, 8))
  found = [source.example(position, position) for position in range(3)]
  assert [int(example["skipped"] > 0) for example in found] == [1, 0, 0]
  np.testing.assert_array_equal(found[1]["frames"], record(1)["pair"])
  assert found[0]["frames"].tobytes() in [record(i)["pair"].tobytes() for i in (1, 2)]


def test_a_damaged_shard_is_named(tmp_path):
  write(tmp_path, 0, 2, [0, 1])
  write(tmp_path, 1, 2, [2, 3])
  shard = labels.find_shards(tmp_path)[1]
  shard.write_bytes(shard.read_bytes()[:70_000])
  with pytest.raises(InputError, match="00001-of-00002.arrayrecord cannot be read: .*; delete it"):
    labels.LabelsSource(tmp_path, image_hw=(8, 8))


def test_where_nobody_asked_for_the_way_back_every_limit_passes_what_training_reads(tmp_path):
  write(tmp_path, 0, 1, [0])
  assert labels.LabelsSource(tmp_path, image_hw=(8, 8)).asked_back
  write(tmp_path, 0, 1, [0], round_trip=np.full(3, np.nan, np.float32))
  source = labels.LabelsSource(tmp_path, image_hw=(8, 8))
  assert not source.asked_back
  np.testing.assert_array_equal(source.example(0, 0)["labels/round_trip"], 0)


def test_labels_of_an_older_version_with_zeros_for_what_nobody_asked_are_read(tmp_path):
  write(tmp_path, 0, 1, [0], round_trip=np.zeros(3, np.float32))
  example = labels.LabelsSource(tmp_path, image_hw=(8, 8)).example(0, 0)
  np.testing.assert_array_equal(example["labels/round_trip"], 0)


def test_missing_shards_are_told(tmp_path, caplog):
  write(tmp_path, 1, 3, [0, 1])
  assert labels.LabelsSource(tmp_path, image_hw=(8, 8)).items == 2
  assert "holds 1 of its job's 3 shards" in caplog.text


def test_an_epoch_of_the_loader_holds_every_record_once_with_its_labels(tmp_path):
  write(tmp_path, 0, 2, [0, 1, 2, 3])
  write(tmp_path, 1, 2, [4, 5])
  (tmp_path / "labels-00001-of-00002.arrayrecord.7.9.partial").write_bytes(b"cut short")
  data = base.get_config().data
  data.batch_size = 2
  data.sources.scenes.weight = 0.0
  data.sources.labels.update(weight=1.0, paths=str(tmp_path))
  with contextlib.closing(loader.make_loader(data, image_hw=(8, 8), seed=0)) as batches:
    assert batches.epoch_examples == 6
    epoch = [next(batches) for _ in range(3)]
  by_pixels = {record(i)["pair"].tobytes(): i for i in range(6)}
  found = [by_pixels[pair.tobytes()] for batch in epoch for pair in batch["frames"]]
  assert sorted(found) == list(range(6))
  first = record(found[0])
  for name in ("points_xy", "flow_xy", "confidence", "visible", "round_trip"):
    np.testing.assert_array_equal(epoch[0][f"labels/{name}"][0], first[name])


def test_what_cannot_be_read_as_labels_is_a_sentence(tmp_path):
  with pytest.raises(InputError, match="holds no labels"):
    labels.LabelsSource(tmp_path, image_hw=(8, 8))
  write(tmp_path, 0, 1, [0])
  with pytest.raises(InputError, match="have 8 x 8 pixels, and those asked for 16 x 16"):
    labels.LabelsSource(tmp_path, image_hw=(16, 16))
  write(tmp_path, 0, 3, [0])
  with pytest.raises(InputError, match="more than one job"):
    labels.LabelsSource(tmp_path, image_hw=(8, 8))

"""The loader: the same stream however it is read, exact resume, mixtures, broken files."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
import time
from pathlib import Path

import grain.python as grain
import jax
import numpy as np
import pytest
from jax._src import xla_bridge
from jax.sharding import AxisType
from orbax.checkpoint import v1 as ocp
from PIL import Image

from cwm_jax.configs import base
from cwm_jax.data import loader as loader_lib
from cwm_jax.data import procedural, rendering, sources
from cwm_jax.data.loader import make_loader, shard_batch
from cwm_jax.types import InputError

IMAGE_HW = (24, 32)


def config(**weights):
  data = base.get_config().data
  data.batch_size, data.prefetch = 4, 1
  data.sources.scenes.max_objects = 2
  for name, source in data.sources.items():
    source.weight = float(weights.get(name, 0.0))
  return data


@pytest.fixture
def mixed(tmp_path, movies):
  """Scenes, five videos of which one is broken, and three frame folders."""
  data = config(scenes=1, video=1, frames=2)
  (tmp_path / "videos/deep").mkdir(parents=True)
  for i in range(4):
    movies.write_video(tmp_path / f"videos/deep/{i}.mp4", 12 + i)
  (tmp_path / "videos/broken.mp4").write_text("not a video")
  for i in range(3):
    movies.write_frames(tmp_path / f"frames/clip{i}", 4 + i)
  data.sources.video.paths = str(tmp_path / "videos")
  data.sources.frames.paths = str(tmp_path / "frames")
  return data


def make(data, **options):
  return make_loader(data, image_hw=IMAGE_HW, seed=5, **options)


def take(loader, count):
  return list(itertools.islice(loader, count))


def assert_same(batches, others):
  assert len(batches) == len(others)
  for one, other in zip(batches, others):
    assert one.keys() == other.keys()
    for name in one:
      np.testing.assert_array_equal(one[name], other[name])


def test_workers_change_nothing_and_a_restored_loader_goes_on_exactly(mixed, tmp_path):
  expected = take(plain := make(mixed), 16)
  # Saved after 5 batches by a loader without workers; read on by one with two, and the reverse.
  saved = {}
  for workers in (0, 2):
    mixed.num_workers = workers
    loader = make(mixed)
    assert_same(take(loader, 5), expected[:5])
    saved[workers] = loader.get_state()
    assert_same(take(loader, 3), expected[5:8])  # reading ahead leaves the saved state alone
    if workers:
      loader.set_state(saved[0])
      assert_same(take(loader, 11), expected[5:])
      assert loader.skipped() == plain.skipped() > 0
    loader.close()
  mixed.num_workers = 0
  loader = make(mixed)
  loader.set_state(saved[2])
  assert_same(take(loader, 11), expected[5:])
  assert loader.skipped() == plain.skipped()


def test_orbax_saves_and_restores_the_place(mixed, tmp_path):
  first, second = make(mixed), make(mixed)
  take(first, 3)
  with ocp.training.Checkpointer(tmp_path / "checkpoints") as checkpointer:
    checkpointer.save_checkpointables(3, dict(data=first))
    checkpointer.load_checkpointables(3, dict(data=second))
  assert second.get_state() == first.get_state()
  assert_same(take(second, 4), take(first, 4))


def test_processes_share_each_batch_between_them_in_its_order(mixed):
  whole = take(make(mixed), 6)
  parts = [take(make(mixed, process_index=i, process_count=2), 6) for i in range(2)]
  for batch, *halves in zip(whole, *parts):
    for name in batch:
      np.testing.assert_array_equal(np.concatenate([half[name] for half in halves]), batch[name])


def test_a_place_saved_by_one_process_serves_two(mixed, tmp_path):
  one = make(mixed)
  take(one, 3)
  with ocp.training.Checkpointer(tmp_path / "checkpoints") as checkpointer:
    checkpointer.save_checkpointables(3, dict(data=one))
    saved = next((tmp_path / "checkpoints").rglob("process_0-of-1.json"))
    saved.rename(saved.with_name("process_1-of-4.json"))
    half = make(mixed, process_index=1, process_count=2)
    checkpointer.load_checkpointables(3, dict(data=half))
  np.testing.assert_array_equal(next(half)["index"], next(one)["index"][2:])


def test_a_batch_comes_from_one_source_drawn_by_weight(mixed):
  kinds, places = [], {"scenes": [], "frames": []}
  for batch in take(make(mixed), 30):
    kind = "frames" if "frames" in batch else "scenes"
    kinds.append(kind)
    if kind == "scenes":
      places[kind] += batch["index"].tolist()
      assert batch["scene/pose"].shape[:2] == (4, 2)
    else:
      assert batch["frames"].shape == (4, 2, *IMAGE_HW, 3)
      assert batch["frames"].dtype == np.uint8
  assert 2 <= kinds.count("scenes") <= 15  # a quarter of 30 is expected
  assert places["scenes"] == list(range(4 * kinds.count("scenes")))  # a curriculum goes in order


def test_the_mixture_keeps_to_its_weights_and_each_source_to_its_order():
  mixture = loader_lib.Mixture([1, 3], seed=0)
  drawn = [mixture[i] for i in range(9000)]  # more than two blocks
  assert 0.72 < np.mean([source for source, _ in drawn]) < 0.78
  for source in (0, 1):
    order = [place for which, place in drawn if which == source]
    assert order == list(range(len(order)))
  assert loader_lib.Mixture([1, 3], seed=0)[8999] == drawn[8999]
  assert [loader_lib.Mixture([1, 3], seed=1)[i][0] for i in range(50)] != [s for s, _ in drawn[:50]]


def test_scenes_follow_the_seed_and_the_curriculum():
  data = config(scenes=1)
  data.sources.scenes.curriculum = ((0, "shifts"), (6, "worlds"))
  data.sources.scenes.fade = 0
  batches = take(make(data), 2)
  for batch in batches:
    for row, index in enumerate(batch["index"]):
      preset = procedural.PRESETS["shifts" if index < 6 else "worlds"]
      seed = data.sources.scenes.first_seed + int(index)
      scene = procedural.draw_scene(seed, preset, max_objects=2)
      for name, value in scene.items():
        np.testing.assert_array_equal(batch[f"scene/{name}"][row], value)


def test_each_epoch_takes_every_video_once_in_another_order(tmp_path, movies):
  for i in range(6):
    movies.write_video(tmp_path / f"{i}.mp4", 6, size_hw=(32, 32 + 2 * i))
  source = sources.VideoSource(
    tmp_path, gap_ms=60.0, image_hw=(16, 16), seed=0, crop="centre", flip=False
  )
  stream = loader_lib.example_stream(_Items(source.items), seed=3)
  epochs = [[int(stream[6 * e + i]["item"]) for i in range(6)] for e in range(4)]
  assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
  assert len({tuple(epoch) for epoch in epochs}) > 1


class _Items:
  """A source whose examples say which item had its turn."""

  def __init__(self, items):
    self.items = items

  def example(self, position, item):
    return {"item": item}


def test_the_size_of_an_epoch_is_known_where_there_is_one(mixed):
  assert make(mixed).epoch_examples == 0  # scenes are endless
  mixed.sources.scenes.weight = 0.0
  assert make(mixed).epoch_examples == 5 + 3
  mixed.epoch_examples = 77
  assert make(mixed).epoch_examples == 77


def test_broken_videos_are_replaced_and_counted(mixed, tmp_path):
  mixed.sources.scenes.weight = mixed.sources.frames.weight = 0.0
  with_broken = make(mixed)
  batches = take(with_broken, 5)  # 20 examples: each of 5 files four times
  assert with_broken.skipped() == 4
  assert all(batch["frames"].shape == (4, 2, *IMAGE_HW, 3) for batch in batches)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_without_one_usable_file_ends_with_a_sentence(tmp_path, workers):
  for i in range(5):
    (tmp_path / f"{i}.mp4").write_text("not a video")
  data = config(video=1)
  data.sources.video.paths, data.num_workers = str(tmp_path), workers
  with pytest.raises(InputError, match=r"none of the 5 items tried can be used; .*\.mp4"):
    next(loader := make(data))
  loader.close()


def test_negative_seeds_are_refused_when_the_loader_is_made():
  data = config(scenes=1)
  for seed, first_seed, told in ((-1, 0, "seed is -1"), (0, -3, "first_seed is -3")):
    data.sources.scenes.first_seed = first_seed
    with pytest.raises(InputError, match=f"{told}; it must be 0 or more"):
      make_loader(data, image_hw=(8, 8), seed=seed)


def test_photographs_go_with_the_scenes(tmp_path):
  rng = np.random.default_rng(0)
  for i in range(3):
    Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(tmp_path / f"{i}.png")
  (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
  data = config(scenes=1)
  data.sources.scenes.photos = str(tmp_path)
  data.sources.scenes.texture_size = 16
  batches = take(loader := make(data), 3)
  for batch in batches:
    assert batch["scene/photos"].shape == (4, sources.PHOTOS_PER_SCENE, 16, 16, 3)
    assert batch["scene/photos"].dtype == np.uint8
  assert loader.skipped() > 0
  assert_same(take(make(data), 3), batches)


def test_photographs_have_the_size_of_what_is_drawn_also_where_scenes_are_drawn_larger(tmp_path):
  Image.fromarray(np.full((40, 50, 3), 128, np.uint8)).save(tmp_path / "grey.png")
  data = config(scenes=1)
  data.sources.scenes.update(photos=str(tmp_path), supersample=2)
  batch = make_loader(data, image_hw=(8, 12), seed=0).first()
  assert batch["scene/photos"].shape[2:4] == (16, 16)
  ways = dict(size_hw=(8, 12), supersample=2)
  pair = jax.eval_shape(lambda b: rendering.render_batch(b, **ways), batch)
  assert pair.frames.shape == (4, 2, 8, 12, 3)


class _Backend:
  """Tells whether the process that reads it has started a JAX backend."""

  items = 0

  def example(self, position, item):
    started = xla_bridge.backends_are_initialized()
    return {"started": np.bool_(started), "skipped": np.int32(0)}


def test_workers_never_start_a_jax_backend():
  jax.devices()  # this process has
  stream = loader_lib.example_stream(_Backend(), seed=0).batch(2)
  loader = loader_lib.Loader(stream, num_workers=1, prefetch=1, epoch_examples=0)
  assert not any(batch["started"].any() for batch in take(loader, 3))
  loader.close()


@pytest.mark.skipif(sys.platform != "linux", reason="looks for the worker in /proc")
def test_workers_end_when_their_trainer_is_killed():
  code = (
    "import multiprocessing, time\n"
    "from cwm_jax.configs import base\n"
    "from cwm_jax.data.loader import make_loader\n"
    "if __name__ == '__main__':\n"
    "  data = base.get_config().data\n"
    "  data.num_workers, data.batch_size = 1, 1\n"
    "  loader = make_loader(data, image_hw=(8, 8), seed=0)\n"
    "  next(loader)\n"
    "  print(multiprocessing.active_children()[0].pid, flush=True)\n"
    "  time.sleep(100)\n"
  )
  trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
  worker = int(trainer.stdout.readline())
  trainer.kill()
  trainer.wait()
  deadline = time.monotonic() + 20
  while _runs(worker):
    assert time.monotonic() < deadline, "the worker outlives its trainer"
    time.sleep(0.1)


def _runs(pid):
  try:
    state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
  except FileNotFoundError:
    return False
  return state != "Z"  # a zombie has ended; nobody may be there to collect it


def test_batches_become_global_arrays():
  mesh = jax.make_mesh((1, 1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
  batch = {"index": np.arange(4), "frames": np.zeros((4, 2, 8, 8, 3), np.uint8)}
  sharded = shard_batch(batch, mesh)
  assert sharded["index"].dtype == np.int32 and sharded["frames"].dtype == np.uint8
  np.testing.assert_array_equal(sharded["index"], batch["index"])


def _no_weight(data):
  data.sources.scenes.weight = 0.0


def _negative_weight(data):
  data.sources.video.weight = -1.0


def _no_paths(data):
  data.sources.video.weight = 1.0


def _nobody(data):
  data.batch_size = 0


def _workers(data):
  data.num_workers = -1


def _preset(data):
  data.sources.scenes.curriculum = ((0, "worlds"), (9, (("shifts", 1.0), ("wolrds", 1.0))))


def _no_stage(data):
  data.sources.scenes.curriculum = ()


def _gap(data):
  data.sources.video.update(dict(weight=1.0, paths=".", gap_ms=0.0))


def _frames_gap(data):
  data.sources.frames.update(dict(weight=1.0, paths=".", gap=0))


def _tfds(data):
  data.sources.tfds.weight = 1.0


WRONG = [
  (_no_weight, "no data source has a weight above 0"),
  (_negative_weight, "weight of data source 'video' is -1.0"),
  (_no_paths, "data.sources.video has a weight but names no paths"),
  (_nobody, "a batch of 0 does not divide by 1 processes"),
  (_workers, "must not be negative"),
  (_preset, "unknown scene preset 'wolrds'"),
  (_no_stage, "a curriculum begins at 0"),
  (_gap, "is 0.0 ms; it must be above 0"),
  (_frames_gap, "is 0 frames; it must be 1 or more"),
  (_tfds, "neither a name nor a data_dir"),
]


@pytest.mark.parametrize("spoil, sentence", WRONG)
def test_a_wrong_config_is_met_with_a_sentence(spoil, sentence):
  data = config(scenes=1)
  spoil(data)
  with pytest.raises(InputError, match=sentence):
    make(data)


def test_a_wrong_crop_is_met_before_training(tmp_path, movies):
  data = config(video=1)
  data.sources.video.paths = str(movies.write_video(tmp_path / "a.mp4", 6))
  data.crop = "center"
  with pytest.raises(InputError, match="crop 'center' is not known"):
    make(data)


def test_a_batch_that_does_not_divide_by_the_processes_is_refused():
  with pytest.raises(InputError, match="a batch of 4 does not divide by 3 processes"):
    make(config(scenes=1), process_index=0, process_count=3)


def test_a_source_that_is_not_known_is_named():
  data = config(scenes=1).to_dict()
  data["sources"]["vidoe"] = dict(weight=1.0)
  with pytest.raises(InputError, match="unknown data source 'vidoe'"):
    make(data)


def test_videos_that_vanish_during_a_run_are_passed_over(mixed, tmp_path):
  mixed.sources.scenes.weight = mixed.sources.frames.weight = 0.0
  loader = make(mixed)
  next(loader)
  for i in range(3):
    (tmp_path / f"videos/deep/{i}.mp4").unlink()
  assert len(take(loader, 4)) == 4
  shutil.rmtree(tmp_path / "videos")
  with pytest.raises(InputError, match="none of the 5 items tried"):
    take(loader, 4)


def test_the_loader_is_a_grain_iterator():
  assert isinstance(make(config(scenes=1)), grain.DatasetIterator)

"""Temporary: procedural scenes only, until data.loader exists."""
import grain
import jax
import numpy as np
from cwm_jax.data import procedural


class _Make(grain.transforms.Map if hasattr(grain, "transforms") else object):
  def __init__(self, scenes):
    self.first, self.curriculum, self.fade, self.max_objects = scenes

  def map(self, i):
    seed = self.first + int(i)
    preset = procedural.preset_at(int(i), self.curriculum, fade=self.fade, seed=seed)
    scene = procedural.draw_scene(seed, preset, max_objects=self.max_objects)
    return {"index": np.int64(i), **{f"scene/{k}": v for k, v in scene.items()}}


def make_loader(data, *, image_hw, seed, batch_size):
  s = data.sources.scenes
  scenes = (s.first_seed, tuple(tuple(x) for x in s.curriculum), s.fade, s.max_objects)
  import sys
  ds = grain.MapDataset.range(sys.maxsize // 1024).map(_Make(scenes)).batch(batch_size, drop_remainder=True)
  ds = ds.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=data.prefetch))
  if data.num_workers:
    ds = ds.mp_prefetch(grain.MultiprocessingOptions(num_workers=data.num_workers))
  return ds


def epoch_examples(data):
  return None


def shard_batch(batch, sharding):
  return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items() if k != "index"}

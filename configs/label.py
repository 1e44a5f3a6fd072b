"""Labels for a student: the shipped predictor asked about points of rendered scenes.

python -m cwm_jax.main --config configs/label.py --workdir runs/labels
cwm-jax label --out runs/labels                                          # the same

As the labels of `student-tiny` were made, at 0.6 pairs/s: scenes like those of scenes-test-v1, of
other seeds, drawn at 256 and shrunk to 128 as the student sees them; 24 points a pair. No truth is
read. With 2 masks a pair costs 50 passes of the predictor, with 10 it would be 250: more labels,
coarser. `:runlocal` is a minute's trial; for video, set data.sources.scenes.weight=0 and
data.sources.video, see configs/base.py.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from cwm_jax.configs import base


def get_config(arg: str = "") -> ConfigDict:
  if arg not in ("", "runlocal"):
    raise ValueError(f"label takes runlocal, not {arg!r}")
  c = base.get_config()
  c.job = "label"
  c.data.batch_size = 8
  c.data.sources.scenes.update(first_seed=700_000_000, curriculum=((0, "scenes-test-v1"),))
  c.data.sources.scenes.supersample = 2
  c.label.update(tracker="mm2", pairs=1024, points=24, image_hw=(128, 128), shard_pairs=32)
  # The teacher's surer half, which distill_tiny.py learns from.
  c.label.min_confidence = 0.1
  if arg == "runlocal":
    c.label.update(pairs=8, shard_pairs=4, image_hw=(64, 64), tracker="mm1")
    c.data.sources.scenes.supersample = 1
    c.data.batch_size = 4
  return c

"""Weights carried on with on your own videos; `cwm-jax train WORKDIR --videos FOLDER` uses it.

`model`, `init_from` and `data.sources.video.paths` are filled in by the command: the network is
that of the weights. To run it by hand, set them yourself:

python -m cwm_jax.main --config configs/finetune.py --workdir DIR \
  --config.init_from=WEIGHTS --config.data.sources.video.paths=FOLDER

A low rate, since the weights are not to be unlearned; a tenth of the pairs stay scenes with motion
of every kind, so that what your videos lack is not forgotten.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from cwm_jax.configs import base


def get_config() -> ConfigDict:
  c = base.get_config()
  c.total = "2000 steps"
  c.optim.update(peak_lr=2e-4, warmup="50 steps", clip_norm=1.0)
  c.data.batch_size = 16
  c.data.sources.video.weight = 0.9
  c.data.sources.scenes.update(
    weight=0.1, first_seed=900_000_000, curriculum=((0, "worlds"),), max_objects=6
  )
  c.log.update(every="20 steps", images_every="500 steps", eval_every="500 steps")
  c.checkpoint.update(every="500 steps", minutes=5.0)
  return c

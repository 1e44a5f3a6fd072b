"""ViT-B/8 at 256 x 256 in bfloat16 on one GPU, in resumable runs of eight minutes.

python -m cwm_jax.main --config configs/pretrain_gpu.py --workdir DIR
One GPU with 80 GB or more; the same command again goes on where the last run left. Batch, speed and
curriculum lengths have not been tried on a GPU yet. `:runlocal` is a few steps of a tiny model.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from cwm_jax.configs import base, pretrain_sizes


def get_config(arg: str = "") -> ConfigDict:
  c = base.get_config()
  pretrain_sizes.resize(c.model, "base")
  c.model.update(mask_ratio=0.9, positions="rotary", dtype="bfloat16", attention_impl="cudnn")
  c.total = "10e6 examples"
  c.stop_after = "8 minutes"
  c.optim.update(peak_lr=3e-4, scale_lr=True, warmup="1000 steps", clip_norm=1.0)
  c.data.update(batch_size=256, num_workers=8)
  c.data.sources.scenes.curriculum = (
    (0, "patch_shifts"),
    (200_000, "strays_1"),
    (400_000, "strays_2"),
    (600_000, "strays_3"),
    (800_000, "strays_4"),
    (1_000_000, (("strays_4", 1.0), ("views", 2.0), ("movers", 2.0))),
    (1_500_000, (("views", 1.0), ("movers", 1.0), ("worlds", 4.0))),
  )
  c.checkpoint.update(every="2000 steps", minutes=5.0)
  c.log.update(every="50 steps", images_every="1000 steps", eval_every="1000 steps")
  if arg == "runlocal":
    pretrain_sizes.resize(c.model, "tiny")
    c.model.update(dtype="float32", attention_impl="")
    c.total, c.optim.warmup = "20 steps", "5 steps"
    c.data.update(batch_size=8, num_workers=0)
    c.log.update(every="5 steps", eval_scenes=4)
  return c

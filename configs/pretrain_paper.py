"""The paper's pretraining: Kinetics-400, 256 x 256, ViT-B/8, batch 1024, 800 epochs.

python -m cwm_jax.main --config configs/pretrain_paper.py --workdir DIR \
  --config.data.sources.video.paths=/path/to/kinetics
Needs a folder of the training videos and several accelerators; not run by this project.
What the paper leaves open (betas, weight decay) is the custom of its field.
`:runlocal` is two steps of the same recipe at 32 x 32, for a look at one's own folder on a laptop.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from cwm_jax.configs import base, pretrain_sizes


def get_config(arg: str = "") -> ConfigDict:
  c = base.get_config()
  pretrain_sizes.resize(c.model, "base")
  # The public release's decoder is as wide and deep as its encoder.
  c.model.update(decoder_width=768, decoder_depth=12, decoder_heads=12)
  c.model.update(mask_ratio=0.9, positions="learned", dtype="bfloat16")
  c.total = "800 epochs"
  c.optim.update(peak_lr=1.5e-4, scale_lr=True, warmup="40 epochs", b1=0.9, b2=0.95)
  c.optim.update(weight_decay=0.05, accumulate=1)
  c.data.update(batch_size=1024, num_workers=16, crop="centre", flip=False)
  c.data.sources.scenes.weight = 0.0
  c.data.sources.video.update(weight=1.0, gap_ms=150.0)
  c.checkpoint.every = "1 epochs"
  c.log.update(every="50 steps", images_every="1 epochs", eval_every="1 epochs")
  if arg == "runlocal":
    pretrain_sizes.resize(c.model, "tiny")
    c.total, c.optim.warmup = "2 steps", "1 steps"
    c.data.update(batch_size=4, num_workers=0)
    c.log.update(every="1 steps", eval_scenes=0)
  return c

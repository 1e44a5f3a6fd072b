"""A small flow network that learns from the shipped predictor's labels alone, on two CPU cores.

python -m cwm_jax.main --config configs/label.py --workdir runs/labels
python -m cwm_jax.main --config configs/distill_tiny.py --workdir runs/student \
    --config.data.sources.labels.paths=runs/labels
cwm-jax convert runs/student student.safetensors

As `student-tiny` was trained: 3,000 steps, 23 minutes.

SEA-RAFT's design at a twentieth of its size: it sees 128 x 128 pixels, whatever the frames have, on
a grid of 16 x 16. `:runlocal` is a minute's trial on the labels of label.py:runlocal.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from cwm_jax.configs import base, label

STUDENT: dict[str, Any] = dict(
  kind="sea_raft",
  image_hw=(128, 128),
  stem_width=16,
  widths=(16, 32, 64),
  depths=(1, 1, 1),
  feature_norm="instance",
  context_norm="group",
  feature_width=64,
  hidden_width=48,
  context_width=48,
  corr_widths=(96, 64),
  flow_widths=(32, 24),
  motion_width=64,
  head_width=96,
  radius=4,
  levels=2,
  refine_blocks=1,
  iterations=4,
)


def get_config(arg: str = "") -> ConfigDict:
  if arg not in ("", "runlocal"):
    raise ValueError(f"distill_tiny takes runlocal, not {arg!r}")
  c = base.get_config()
  c.task = "distill"
  c.total = "24e3 examples"
  c.flow_network.update(STUDENT)
  c.data.batch_size = 8
  c.data.sources.scenes.update(
    weight=0.0,
    first_seed=700_000_000,
    curriculum=((0, "scenes-test-v1"),),
    supersample=2,
  )
  c.data.sources.labels.update(weight=1.0, paths="runs/labels")
  # The size of the pairs, and which labels count.
  c.label.update(label.get_config(arg).label)
  c.optim.update(
    peak_lr=1e-3,
    schedule="one_cycle",
    warmup="250 steps",
    clip_norm=1.0,
    weight_decay=1e-5,
    b2=0.999,
    ema_decay=0.999,
  )
  c.log.update(every="50 steps", eval_every="500 steps", images_every="1000 steps")
  c.checkpoint.every = "500 steps"
  if arg == "runlocal":
    c.flow_network.image_hw = c.label.image_hw
    c.data.sources.scenes.supersample = 1
    c.total = "20 steps"
    c.data.batch_size = 4
    c.optim.warmup = "5 steps"
    c.log.update(every="5 steps", eval_scenes=8)
  return c

"""Learned marks for the shipped predictor, on procedural scenes and two CPU cores.

python -m cwm_jax.main --config configs/joint_tiny.py --workdir runs/joint

The perturber is trained through the frozen predictor. Psi-flow begins as that predictor, told of
the flow by patches of frame 1 put where it leads: its error says from the first step how good a
flow is, and it is only touched up. A Psi-flow from scratch (`flow_predictor.kind="single"`) needs
thousands of pairs before it heeds the flow, and leads the perturber astray until then. Arguments:

  (none)    at 64 x 64, the shipped weights
  large     at 128 x 128. Marks keep their share of the image. The shipped weights are refused:
            `python -m cwm_jax.main --config configs/pretrain_tiny.py:double --workdir runs/double
            --config.init_from=cwm_jax/weights/predictor-tiny.safetensors` fine-tunes them to that
            size and `cwm-jax convert runs/double double.safetensors` makes the file to be named by
            --config.joint.weights.
  runlocal  a minute's trial

A step takes about 2 s, nearly all of it in the predictor's marked passes, there and back.

Frames lie further apart than in pretraining: the scenes move by up to a quarter of the image, and
frames of video, should any be given, are 500 ms apart rather than 150, as in the paper.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from cwm_jax.configs import base


def get_config(arg: str = "") -> ConfigDict:
  if arg not in ("", "large", "runlocal"):
    raise ValueError(f"joint_tiny takes large or runlocal, not {arg!r}")
  c = base.get_config()
  c.task = "joint"
  c.total = "250 steps"
  c.perturber.update(hidden_width=256, reach=0.0, on_pixel=False)
  # At the paper's 200 nearly all of the soft-argmax's weight is on one pixel of so small an image,
  # and no gradient is left; well below 100 its expectation leans to the middle of the image.
  c.joint.update(num_points=8, masks="shared", inverse_temperature=100.0)
  c.flow_predictor.kind = "moved"
  c.optim.update(
    peak_lr=2e-3, warmup="20 steps", clip_norm=1.0, freeze="^predictor/", b2=0.99, ema_decay=0.99
  )
  c.optim.slow = (("^flow_predictor/", 0.1, "0 steps"),)
  c.data.batch_size = 4
  c.data.sources.scenes.update(
    first_seed=900_000_000,
    curriculum=((0, (("views", 1.0), ("movers", 1.0), ("worlds", 2.0))),),
    max_objects=6,
  )
  c.data.sources.video.gap_ms = 500.0
  # How much Psi-flow leans on the flow is to be seen while it learns to, so on fewer scenes.
  c.log.update(every="20 steps", eval_every="100 steps", images_every="100 steps", eval_scenes=32)
  c.checkpoint.every = "250 steps"
  if arg == "large":
    c.perturber.scale = 2
    c.data.batch_size = 2
  elif arg == "runlocal":
    c.total = "20 steps"
    c.joint.num_points = 2
    c.data.batch_size = 2
    c.optim.warmup = "5 steps"
    c.log.update(every="5 steps", eval_scenes=8, eval_masks=1)
  return c

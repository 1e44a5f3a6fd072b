"""Learned marks for the shipped predictor, on procedural scenes and two CPU cores.

python -m cwm_jax.main --config configs/joint_tiny.py --workdir runs/joint

The perturber and a small Psi-flow are trained through the frozen predictor. Arguments:

  (none)    at 64 x 64, the shipped weights
  large     at 128 x 128, for weights that were fine-tuned so (configs/pretrain_tiny.py:double);
            name them by --config.joint.weights. Marks keep their share of the image.
  runlocal  a minute's trial

A step of 4 pairs of 4 points takes 1.3 s of CPU time (measured), nearly all of it in the
predictor's marked passes, there and back; 8 points, as here, take about twice that.

Frames lie further apart than in pretraining (the paper: 500 ms rather than 150): the scenes move
by up to a quarter of the image. With video, set data.sources.video.gap_ms.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from cwm_jax.configs import base


def get_config(arg: str = "") -> ConfigDict:
  if arg not in ("", "large", "runlocal"):
    raise ValueError(f"joint_tiny takes large or runlocal, not {arg!r}")
  c = base.get_config()
  c.task = "joint"
  c.total = "1500 steps"
  c.perturber.hidden_width = 256
  c.joint.update(num_points=8, masks="shared")
  c.flow_predictor.patch = 4
  c.flow_predictor.single.update(width=128, depth=4, heads=4, context=4)
  c.optim.update(
    peak_lr=1e-3, warmup="50 steps", clip_norm=1.0, freeze="^predictor/", b2=0.99, ema_decay=0.99
  )
  # Until Psi-flow heeds the flow, its gradient tells the perturber nothing: it is led astray.
  c.optim.slow = (("^perturber/", 0.1, "200 steps"),)
  c.data.batch_size = 4
  c.data.sources.scenes.update(
    first_seed=900_000_000,
    curriculum=((0, (("views", 1.0), ("movers", 1.0), ("worlds", 2.0))),),
    max_objects=6,
  )
  c.log.update(every="20 steps", eval_every="250 steps", images_every="100 steps", eval_scenes=64)
  c.checkpoint.every = "250 steps"
  if arg == "large":
    c.perturber.scale = 2
    c.data.batch_size = 2
  elif arg == "runlocal":
    c.total = "20 steps"
    c.joint.num_points = 2
    c.flow_predictor.single.update(width=64, depth=1, heads=2)
    c.data.batch_size = 2
    c.optim.update(warmup="5 steps", slow=(("^perturber/", 0.1, "10 steps"),))
    c.log.update(every="5 steps", eval_scenes=8, eval_masks=1)
  return c

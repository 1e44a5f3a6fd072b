"""The release's joint training: its predictor, its two-stream Psi-flow, pairs 500 ms apart.

python -m cwm_jax.main --config configs/joint_paper.py --workdir DIR \
  --config.data.sources.video.paths=/path/to/kinetics
Needs a folder of the training videos, the public predictor (`joint.weights`: opt-cwm-256, or a
weights file) and accelerators; not run by this project. Frames are 224 x 224 to Psi-flow and
resized for the predictor. 400 epochs of 10,000 pairs as in the release, batch 32 as in the paper,
whose 200 epochs are of another length. `--config.flow_predictor.kind=file` goes on from the
Psi-flow that a converted joint checkpoint holds, `--config.perturber.init=file
--config.perturber.file=FILE` from its mark. The mark is of 20 pixels, made for images of 256: with
a predictor of 512 x 512, such as opt-cwm-512, `--config.perturber.scale=2` keeps its share.
`:runlocal` is two steps of the same recipe with the shipped predictor and a small Psi-flow.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from cwm_jax.configs import base, opt_cwm


def get_config(arg: str = "") -> ConfigDict:
  if arg not in ("", "runlocal"):
    raise ValueError(f"joint_paper takes runlocal, not {arg!r}")
  c = base.get_config()
  c.task = "joint"
  c.total = "400 epochs"
  c.joint.update(weights="opt-cwm-256", image_hw=(224, 224), num_points=8, query="centre")
  c.joint.update(protocol="release", average="release")
  c.perturber.update(init="white", **opt_cwm.PERTURBER)
  c.flow_predictor.update(opt_cwm.FLOW_PREDICTOR)
  c.flow_predictor.two_stream.update(opt_cwm.TWO_STREAM)
  c.optim.update(freeze="^predictor/", **opt_cwm.JOINT_OPTIM)
  c.data.update(batch_size=32, num_workers=16, crop="centre", flip=False, epoch_examples=10_000)
  c.data.sources.scenes.weight = 0.0
  c.data.sources.video.update(weight=1.0, gap_ms=500.0)
  c.checkpoint.every = "1 epochs"
  c.log.update(every="50 steps", images_every="10 epochs", eval_every="10 epochs")
  if arg == "runlocal":
    c.total, c.optim.warmup = "2 steps", "1 steps"
    c.joint.update(weights="", image_hw=(), num_points=2)
    c.perturber.size = 0
    links = ("o<->o", "o-_")
    c.flow_predictor.patch = 4
    c.flow_predictor.two_stream.update(grid_hw=(), encoder_links=links, decoder_links=links)
    c.flow_predictor.two_stream.update(encoder_width=48, decoder_width=48)
    c.data.update(batch_size=2, num_workers=0)
    c.log.update(every="1 steps", eval_scenes=0)
  return c

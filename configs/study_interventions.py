"""Marks against numbers of masks, hand-made and learned: the paper's Table 3 at small scale.

bash launch/study WORKDIR
python -m cwm_jax.main --config configs/study_interventions.py --workdir WORKDIR \
  --config.study.tapvid=PATH

Two joint trainings a seed (configs/joint_tiny.py says what they take), then each cell's
evaluation. A study that is killed goes on with the same command; what is done is kept cell by cell,
and study.md and study.png are made anew after each. How much Psi-flow leans on the learned marks'
flow is asked once a training, for the table "Bottleneck"; a WORKDIR that lacks it gets it, and no
other measurement, by --config.study.masks="()". `:runlocal` takes a few scenes, one seed, short
trainings.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from cwm_jax.configs import joint_tiny


def get_config(arg: str = "") -> ConfigDict:
  if arg not in ("", "runlocal"):
    raise ValueError(f"study_interventions takes runlocal, not {arg!r}")
  c = joint_tiny.get_config(arg)
  c.job = "study"
  c.log.update(eval_every="0 steps", eval_scenes=0)
  if arg == "runlocal":
    c.study.update(masks=(1, 2), seeds=(0,), scenes=5, bottleneck_scenes=8)
  return c

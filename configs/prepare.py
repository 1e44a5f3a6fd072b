"""A folder of videos into ArrayRecord shards of short clips, a TFDS dataset.

python -m cwm_jax.main --config configs/prepare.py --workdir OUT --config.prepare.videos=FOLDER
cwm-jax prepare FOLDER --out OUT                                             # the same

Train on it by data.sources.tfds: weight=1, data_dir=OUT/clips/1.0.0 and a gap in frames; at 20
frames a second 3 frames are 150 ms. `:kinetics` takes 4 clips of each 10-second video. Killed, it
goes on with the same command.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from cwm_jax.configs import base


def get_config(arg: str = "") -> ConfigDict:
  if arg not in ("", "kinetics"):
    raise ValueError(f"prepare takes kinetics, not {arg!r}")
  c = base.get_config()
  c.job = "prepare"
  if arg == "kinetics":
    c.prepare.limit = 4
  return c

r"""TAP-Vid clips in the folder form, protocols First and CFG, weights beside classical trackers.

python -m cwm_jax.main --config configs/eval_tapvid.py --workdir /tmp/tapvid \
  --config.evaluate.tapvid=DIR
The classical ones need the extra `baselines`. `:runlocal` leaves them out and takes one mask.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from cwm_jax.configs import base


def get_config(arg: str = "") -> ConfigDict:
  c = base.get_config()
  c.job = "evaluate"
  c.evaluate.trackers = ("mm10", "zero", "phase", "dis", "farneback", "lk")
  c.evaluate.trackers += ("dis_chain", "farneback_chain", "lk_chain")
  if arg == "runlocal":
    c.evaluate.trackers = ("mm1", "zero")
  return c

r"""TAP-Vid clips, the shipped weights beside classical trackers.

python -m cwm_jax.main --config configs/eval_tapvid.py --workdir /tmp/tapvid \
  --config.evaluate.tapvid=PATH
PATH is a folder of clip folders, one of TAP-Vid's .pkl files, or a folder of its shards;
cwm_jax/data/tapvid_pickles.py says where to obtain them. The classical trackers need the extra
`baselines`. Arguments:

  (none)    protocols First and CFG-5
  strided   TAP-Vid's query-strided protocol
  release   as the public Opt-CWM evaluation: its settings (10 masks, 4 rounds of zoom, argmax), its
            way of resizing and of reading whole pixels, and its conventions, First and CFG-5
  release_distilled  the same for its distilled SEA-RAFT, with clips at multiples of 16 pixels
  runlocal  one mask and zero motion alone

A run that is killed goes on, clip by clip, with the same command. With --distributed, and with
several devices, the clips are shared out.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from cwm_jax.configs import base


def get_config(arg: str = "") -> ConfigDict:
  c = base.get_config()
  c.job = "evaluate"
  c.evaluate.trackers = ("mm10", "student-tiny", "zero", "phase")
  c.evaluate.trackers += ("dis", "farneback", "lk", "dis_chain", "farneback_chain", "lk_chain")
  if arg == "strided":
    c.evaluate.protocols = ("strided",)
  elif arg in ("release", "release_distilled"):
    c.evaluate.trackers = ("mm10", "zero")
    c.evaluate.protocols = ("release_first", "release_cfg")
    c.evaluate.update(zoom=4, readout="argmax", order="release", average="release")
    c.evaluate.tracker_protocol = "release"
    if arg == "release_distilled":
      c.evaluate.update(trackers=("opt-cwm-distilled", "zero"), resolution="nearest_16")
  elif arg == "runlocal":
    c.evaluate.trackers = ("mm1", "zero")
  elif arg:
    raise ValueError(
      f"eval_tapvid takes strided, release, release_distilled or runlocal, not {arg!r}"
    )
  return c

"""`cwm-jax prepare`: a folder of videos into a dataset of clips, without a config file to write."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from cwm_jax import commands, jobs, terminal


def run(
  *,
  videos: str,
  seconds: float | None,
  fps: float | None,
  limit: int | None,
  workers: int | None,
  settings: Sequence[str],
  out: str,
  as_json: bool,
) -> None:
  """Cuts clips from videos; see `cwm_jax.prepare`.

  Args:
    videos: folder, list file or one video.
    seconds, fps, limit, workers: see section `prepare` of configs/base.py; None takes the config's.
    settings: KEY=VALUE of any config key.
    out: folder; the dataset is OUT/clips/1.0.0.
    as_json: print the manifest's counts instead of a line.

  Raises:
    InputError: anything given that cannot be used.
  """
  from cwm_jax import prepare as job

  config = jobs.load_config("prepare")
  given = {"seconds": seconds, "fps": fps, "limit": limit, "workers": workers}
  config.prepare.update({name: value for name, value in given.items() if value is not None})
  config.prepare.videos = videos
  jobs.set_keys(config, settings)
  config.lock()
  with terminal.log_shown():
    folder = job.run(config, out)
  manifest = json.loads((folder / job.MANIFEST).read_text())
  facts = {name: manifest[name] for name in ("clips", "videos", "bytes")}
  facts |= {"skipped": len(manifest["skipped"]), "dataset": str(folder)}
  text = (
    f"{facts['clips']} clips of {facts['videos']} videos, {facts['skipped']} left out or cut short "
    f"({job.MANIFEST} says why)\nto train on them:\n  {_training(folder, config.prepare.fps)}"
  )
  commands.report(facts, text, as_json=as_json)


def _training(folder: Path, fps: float) -> str:
  """The command that goes on training weights on the clips, pairs of frames 150 ms apart."""
  keys = {
    "video.weight": 0.0,
    "tfds.weight": 0.9,
    "tfds.data_dir": folder,
    "tfds.gap": max(1, round(0.15 * fps)),
  }
  told = (shlex.quote(f"data.sources.{name}={value}") for name, value in keys.items())
  return " ".join(["cwm-jax train WORKDIR", *(f"--set {setting}" for setting in told)])

"""A training that is killed again and again, against one that is left alone.

Run by `launch/bench soak`. Lives of the run are killed as by `kill -9`, each at a random moment
from its start-up on, and the next one goes on in the same workdir. In the end every number of the
state must be the undisturbed run's, to the bit. Checkpoints are frequent, so that kills fall into
saves as well as into steps. What is imported is imported once: lives are forked before JAX starts.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import bench_facts
import jax

from cwm_jax import checkpoint, fingerprint, progress, train
from cwm_jax.configs import pretrain_tiny

STEPS_A_LIFE = 8  # on average, before the kill


def job(kills: int) -> Any:
  """A training of 16 x 16 pixels, long enough for `kills` lives, with all that a state can hold."""
  config = pretrain_tiny.get_config("runlocal")
  config.total = f"{2 * STEPS_A_LIFE * (kills + 1)} steps"
  config.model.update(image_hw=(16, 16), encoder_width=32, decoder_width=32)
  config.model.update(encoder_heads=2, decoder_heads=2)
  config.data.sources.scenes.max_objects = 1
  config.optim.ema_decay = 0.9
  config.log.update(every="1 steps", eval_every="0 steps", images_every="0 steps", eval_scenes=0)
  config.checkpoint.every = "5 steps"
  return config


def life(config: Any, workdir: Path, seconds: float | None) -> tuple[bool, float]:
  """One process of the training; (whether it lived to the end, seconds from its first step on).

  Args:
    seconds: when it is killed, counted from its first step; below 0 that many before it, as far as
      a start-up is known to last; None leaves it alone.

  Raises:
    RuntimeError: it ended with an error of its own.
  """
  begins, begun = os.pipe()
  child = os.fork()
  if not child:
    code = 1
    try:
      _train(config, workdir, begun)
      code = 0
    finally:
      os._exit(code)
  os.close(begun)
  if seconds is not None and seconds < 0:
    time.sleep(-seconds)
  else:
    os.read(begins, 1)  # also returns when it ends without having begun
    began = time.monotonic()
    while seconds is None or time.monotonic() - began < seconds:
      done, status = os.waitpid(child, os.WNOHANG)
      if done:
        os.close(begins)
        if status:
          raise RuntimeError(f"the training left with status {status}; its log is in {workdir}/log")
        return True, time.monotonic() - began
      time.sleep(0.002)
  os.close(begins)
  os.kill(child, signal.SIGKILL)
  os.waitpid(child, 0)
  return False, 0.0


class _Beginning(logging.Handler):
  """Writes a byte when training reports its first step: all is compiled then."""

  def __init__(self, begun: int):
    super().__init__()
    self._begun = begun

  def emit(self, record: logging.LogRecord) -> None:
    if record.getMessage().startswith("step "):
      os.write(self._begun, b"!")


def _train(config: Any, workdir: Path, begun: int) -> None:
  workdir.mkdir(exist_ok=True)
  log = os.open(workdir / "log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
  os.dup2(log, 1)
  os.dup2(log, 2)
  progress.log.setLevel(logging.INFO)
  progress.log.addHandler(_Beginning(begun))
  state = train.train(config, workdir)
  (workdir / "state.json").write_text(json.dumps(fingerprint.of_tree(state)))


def soak(kills: int, seed: int, folder: Path) -> dict[str, Any]:
  """The row of one soak."""
  draw, config = random.Random(seed), job(kills)
  _, whole = life(config, folder / "whole", None)
  a_life = whole / (2 * (kills + 1))
  struck = []
  for _ in range(kills):
    # One in five falls into the start-up, where checkpoints are read.
    moment = -draw.uniform(0.2, 2.0) if draw.random() < 0.2 else draw.uniform(0, 2 * a_life)
    ended, _ = life(config, folder / "killed", moment)
    if ended:
      break
    found = [int(path.name) for path in (folder / "killed").glob("checkpoints/[0-9]*[0-9]")]
    unfinished = list((folder / "killed").glob("checkpoints/*tmp*"))
    struck.append(dict(saved=max(found, default=0), in_a_save=bool(unfinished)))
    print(f"kill {len(struck)}: at {moment:.2f} s, {struck[-1]}", file=sys.stderr, flush=True)
  life(config, folder / "killed", None)
  states = [json.loads((folder / name / "state.json").read_text()) for name in ("whole", "killed")]
  params = [checkpoint.load_params(folder / name)[0] for name in ("whole", "killed")]
  # Its compilations are its lives'; this process only starts them and looks on.
  return bench_facts.row(
    "soak",
    compilations=None,
    kills=len(struck),
    kills_in_a_save=sum(kill["in_a_save"] for kill in struck),
    steps_saved=[kill["saved"] for kill in struck],
    identical=states[0] == states[1] and same_bytes(*params),
    steps=int(config.total.split()[0]),
    seconds_undisturbed=round(whole, 1),
    seed=seed,
  )


def same_bytes(one: Any, other: Any) -> bool:
  """Whether two nested dicts hold the same arrays, to the bit."""
  if isinstance(one, dict):
    return one.keys() == other.keys() and all(same_bytes(one[key], other[key]) for key in one)
  return one.tobytes() == other.tobytes()


def main() -> int:
  """Prints the row; exit code 1 where a run was not the undisturbed one."""
  parser = argparse.ArgumentParser(prog="launch/bench soak", description=__doc__.split("\n\n")[0])
  parser.add_argument("--kills", type=int, default=25)
  parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
  options = parser.parse_args()
  if options.kills < 1:
    parser.error("kills are 1 or more")
  folder = Path(tempfile.mkdtemp(prefix="cwm-soak-"))
  # What one life compiled the next ones read; each would spend most of its time on it otherwise.
  jax.config.update("jax_compilation_cache_dir", str(folder / "programs"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  row = soak(options.kills, options.seed, folder)
  print(json.dumps(row), flush=True)
  if row["identical"] and row["kills"] == options.kills:
    shutil.rmtree(folder)
    return 0
  print(f"the workdirs are kept in {folder}", file=sys.stderr)
  return 1


if __name__ == "__main__":
  sys.exit(main())

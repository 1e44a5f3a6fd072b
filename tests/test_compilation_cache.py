"""Programs that one process compiled are read by the next, and do the same."""

from __future__ import annotations

import json

import jax
import pytest
import tiny_job

from cwm_jax import compilation_cache
from cwm_jax.pretrained import releases

# A training job as its command starts it, which keeps the programs that are quick to compile too: a
# fast machine has no others. Says at its end what was asked of the kept programs.
JOB = """
import atexit, collections, json, sys
import jax

heard = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: heard.update([event.split("/")[-1]]))
atexit.register(lambda: print("HEARD" + json.dumps(heard)))
from cwm_jax import compilation_cache, main

keep_programs = compilation_cache.keep_programs

def keep_all():
  keep_programs()
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

compilation_cache.keep_programs = keep_all
main.main()
"""


@pytest.fixture
def no_folder():
  """JAX without a folder for programs, as a user has it."""
  before = (
    jax.config.jax_compilation_cache_dir,
    jax.config.jax_persistent_cache_min_compile_time_secs,
  )
  jax.config.update("jax_compilation_cache_dir", None)
  yield
  jax.config.update("jax_compilation_cache_dir", before[0])
  jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])


def test_a_training_that_is_started_again_reads_its_programs_and_computes_the_same(tmp_path):
  heard, losses = [], []
  for name in ("first", "second"):
    done = tiny_job.run_script(
      JOB,
      f"--config={tiny_job.__file__}",
      f"--workdir={tmp_path / name}",
      "--config.total=3 steps",
      XLA_FLAGS=tiny_job.QUICK,
      JAX_COMPILATION_CACHE_DIR="",
      CWM_JAX_CACHE=str(tmp_path / "cache"),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    heard.append(json.loads(done.stdout.partition("HEARD")[2]))
    losses.append([row["loss"] for row in tiny_job.rows(tmp_path / name) if "loss" in row])
  (kind,) = (tmp_path / "cache" / "programs").iterdir()
  assert any(kind.iterdir())
  # The first finds those only that it has compiled before itself.
  assert heard[0].get("cache_hits", 0) < heard[1]["cache_hits"]
  assert heard[1].get("cache_misses", 0) < heard[0]["cache_misses"]
  assert len(losses[0]) == 3 and losses[0] == losses[1]


def test_processes_of_one_job_keep_programs_only_where_jax_is_told_a_folder(no_folder, monkeypatch):
  monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
  compilation_cache.keep_programs()
  assert jax.config.jax_compilation_cache_dir is None
  monkeypatch.undo()
  compilation_cache.keep_programs()
  kept = jax.config.jax_compilation_cache_dir
  assert kept.startswith(str(releases.cache_folder() / "programs"))
  monkeypatch.setenv("CWM_JAX_CACHE", "/elsewhere")
  compilation_cache.keep_programs()
  assert jax.config.jax_compilation_cache_dir == kept

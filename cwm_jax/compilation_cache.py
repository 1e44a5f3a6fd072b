"""Compiled programs that are kept from one process to the next, so that the next begins sooner."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

from cwm_jax.pretrained import releases


def keep_programs() -> None:
  """Has compiled programs kept in the cache folder; call it before anything is compiled.

  Where JAX is told a folder of its own (JAX_COMPILATION_CACHE_DIR), that one is used. Programs are
  those of one kind of processor: a home shared by several machines gets a folder for each.

  Processes of one job keep none unless JAX is told a folder: on GPUs they choose their kernels
  together, and one that found its program would leave the others waiting. A folder that all of them
  see has the program for all or for none.
  """
  import jax

  if jax.config.jax_compilation_cache_dir or jax.distributed.is_initialized():
    return
  kind = hashlib.sha256(_processor().encode()).hexdigest()[:12]
  jax.config.update("jax_compilation_cache_dir", str(releases.cache_folder() / "programs" / kind))
  if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _processor() -> str:
  try:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    return f"{platform.node()} {platform.machine()}"
  return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags"))}))

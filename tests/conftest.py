"""What every test shares: run-time shape checks, the real-data folders, a compilation cache."""

from __future__ import annotations

import os
from pathlib import Path

import given_folders
import pytest
from absl import flags
from jaxtyping import install_import_hook

# The same numbers and no fight over a GPU's memory on every machine; set it to test on another.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Help is wrapped to the terminal, whichever the tests are started from.
os.environ["COLUMNS"] = "80"
# Servers of the tests are asked directly where the machine has a proxy.
_others = os.environ.get("no_proxy") or os.environ.get("NO_PROXY", "")
os.environ["no_proxy"] = os.environ["NO_PROXY"] = f"{_others},127.0.0.1,localhost".lstrip(",")

# Must come before the first import of the package: annotations are checked from then on.
install_import_hook("cwm_jax", "typechecker.check")

# Grain's worker processes read absl flags, which nothing has parsed under pytest.
flags.FLAGS.mark_as_parsed()

# Most of the suite's time is compiling. What is about numbers or speed is optimised as for users,
# by the fixture `fully_optimised`.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# XLA's older generator of CPU code takes two thirds of the time. That users' programs, by the newer
# one, give the stored numbers too is tested in tests/parity/test_as_users_compile.py.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")

# Saves compile time from one run to the next; nothing depends on what is in it.
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


@pytest.fixture(scope="module")
def fully_optimised():
  """This module's programs are fully optimised, as users' are, though by XLA's older generator."""
  import jax

  jax.config.update("jax_disable_most_optimizations", False)
  yield
  # JAX tells nobody what it was.
  before = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"].lower() in ("1", "true")
  jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def cwm_data() -> Path:
  """The folder of real videos, tracks and flow files."""
  return given_folders.named_by("CWM_DATA")


@pytest.fixture(scope="session")
def cwm_goldens() -> Path:
  """The folder of stored reference values: CWM_GOLDENS, or the extract that comes with us."""
  if os.environ.get("CWM_GOLDENS"):
    return given_folders.named_by("CWM_GOLDENS")
  extract = Path(__file__).parent.parent / "third_party" / "opt_cwm" / "goldens"
  return given_folders.Extract(extract)

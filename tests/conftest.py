"""What every test shares: run-time shape checks, the real-data folders, a compilation cache."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from absl import flags
from jaxtyping import install_import_hook

# The same numbers and no fight over a GPU's memory on every machine; set it to test on another.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Must come before the first import of the package: annotations are checked from then on.
install_import_hook("cwm_jax", "typechecker.check")

# Grain's worker processes read absl flags, which nothing has parsed under pytest.
flags.FLAGS.mark_as_parsed()

# Most of the suite's time is compiling. What is about numbers or speed is compiled as for users, by
# the fixture `fully_optimised`.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

# Saves compile time from one run to the next; nothing depends on what is in it.
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


@pytest.fixture(scope="module")
def fully_optimised():
  """Programs that this module compiles are those that a user's process would compile."""
  import jax

  jax.config.update("jax_disable_most_optimizations", False)
  yield
  # JAX tells nobody what it was.
  before = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"].lower() in ("1", "true")
  jax.config.update("jax_disable_most_optimizations", before)


def _folder_named_by(variable: str) -> Path:
  """The folder that an environment variable names; skips the test, or fails it where CI=true."""
  value = os.environ.get(variable, "")
  if value and Path(value).is_dir():
    return Path(value)
  reason = f"set {variable} to an existing folder to run this test (it is {value!r})"
  if os.environ.get("CI", "").lower() in ("1", "true"):
    pytest.fail(reason)
  pytest.skip(reason)


@pytest.fixture(scope="session")
def cwm_data() -> Path:
  """The folder of real videos, tracks and flow files."""
  return _folder_named_by("CWM_DATA")


class _Extract(type(Path())):
  """A folder that holds a part of a set: a test that needs more of it is skipped."""

  def __truediv__(self, name):
    path = Path(str(self), name)
    if not path.exists():
      pytest.skip(f"set CWM_GOLDENS to a whole set to run this test; the extract lacks {name}")
    return path


@pytest.fixture(scope="session")
def cwm_goldens() -> Path:
  """The folder of stored reference values: CWM_GOLDENS, or the extract that comes with us."""
  if os.environ.get("CWM_GOLDENS"):
    return _folder_named_by("CWM_GOLDENS")
  return _Extract(Path(__file__).parent.parent / "third_party" / "opt_cwm" / "goldens")

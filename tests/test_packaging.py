"""What is shipped: a wheel that holds configs and weights, and launch scripts that parse."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory):
  """The names of all files in a wheel built from a copy of the tree."""
  copy = tmp_path_factory.mktemp("tree")
  # Built elsewhere: setuptools leaves a build folder whose stale files would end up in the wheel.
  for name in ("cwm_jax", "configs", "third_party"):
    shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
  for name in ("pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, copy)
  out = tmp_path_factory.mktemp("wheel")
  command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", out, copy]
  built = subprocess.run(command, capture_output=True, text=True, timeout=300)
  assert built.returncode == 0, built.stderr
  (wheel,) = out.glob("cwm_jax-*.whl")
  return set(zipfile.ZipFile(wheel).namelist())


def test_the_wheel_carries_every_module_and_config(wheel_names):
  modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "cwm_jax").rglob("*.py")}
  configs = {f"cwm_jax/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
  assert "cwm_jax/configs/base.py" in configs
  assert (modules | configs) <= wheel_names


def test_the_wheel_carries_the_weights_their_cards_the_test_sets_seeds_and_the_viewers_page(
  wheel_names,
):
  data = {
    path.relative_to(ROOT).as_posix()
    for pattern in ("weights/*.safetensors", "weights/*.md", "data/*.txt", "viewer/*.html")
    for path in (ROOT / "cwm_jax").glob(pattern)
  }
  assert {"cwm_jax/data/scenes_test_v1.txt", "cwm_jax/viewer/page.html"} <= data
  assert data <= wheel_names


def test_the_wheel_carries_the_releases_tables_and_none_of_their_goldens(wheel_names):
  tables = {
    f"cwm_jax/{path.relative_to(ROOT).as_posix()}"
    for path in (ROOT / "third_party").glob("*/RELEASE.toml")
  }
  assert "cwm_jax/third_party/opt_cwm/RELEASE.toml" in tables
  assert tables <= wheel_names
  assert not any("goldens" in name for name in wheel_names)


def test_the_wheel_carries_its_licence_and_nothing_of_the_tests(wheel_names):
  assert any(name.endswith("licenses/LICENSE") for name in wheel_names)
  assert not any(name.startswith(("tests/", "launch/", "configs/")) for name in wheel_names)


def test_an_installed_package_finds_its_configs():
  from cwm_jax.configs import base

  assert base.get_config().job == "train"


SCRIPTS = [path for path in sorted((ROOT / "launch").iterdir()) if path.suffix == ""]


@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / ".ci/run"], ids=lambda path: path.name)
def test_the_launch_scripts_are_correct_bash(script):
  checked = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
  assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_the_pins_allow_what_the_package_asks_for(python):
  import tomllib

  from packaging.requirements import Requirement
  from packaging.utils import canonicalize_name

  lines = (ROOT / "launch" / "constraints.txt").read_text().splitlines()
  pins = {}
  for pin in map(Requirement, (line for line in lines if line and not line.startswith("#"))):
    if pin.marker is None or pin.marker.evaluate({"python_version": python}):
      (exact,) = pin.specifier
      assert exact.operator == "=="
      pins[canonicalize_name(pin.name)] = exact.version
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  asked = project["dependencies"] + project["optional-dependencies"]["dev"]
  for requirement in map(Requirement, asked):
    name = canonicalize_name(requirement.name)
    if name != "cwm-jax":
      assert requirement.specifier.contains(pins[name]), f"{requirement} is pinned to {pins[name]}"

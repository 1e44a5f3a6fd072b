"""What is shipped: a wheel that holds configs and weights and works on its own; launch scripts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import command_line
import pytest
import tiny_job

from cwm_jax import viz

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  """A wheel built from a copy of the tree."""
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
  return wheel


@pytest.fixture(scope="module")
def wheel_names(wheel):
  """The names of all files in it."""
  return set(zipfile.ZipFile(wheel).namelist())


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
  """The folder of programs of a new environment in which the wheel, and nothing else, is installed.

  What the package depends on is not installed again but taken from the environment of the tests,
  whose folder stands behind the new one's own on the path. An editable installation there is not
  seen: the hook that makes it work is only read in an environment's own folder. That the stated
  dependencies are enough is shown where everything is installed anew, by `launch/test`.
  """
  place = tmp_path_factory.mktemp("clean") / "env"
  subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True, timeout=120)
  programs = place / ("Scripts" if os.name == "nt" else "bin")
  pip = [sys.executable, "-m", "pip", "--python", programs / "python", "install", "--quiet"]
  pip += ["--disable-pip-version-check", "--no-index", "--no-deps", wheel]
  done = subprocess.run(pip, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr
  (own,) = place.rglob("site-packages")
  (own / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
  return programs


def _outside(command, folder):
  """A command in a folder that is no checkout, with nothing of the tests on its path."""
  environment = tiny_job.environment(XLA_FLAGS=tiny_job.QUICK)
  del environment["PYTHONPATH"]
  return subprocess.run(
    command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500
  )


def test_the_wheel_carries_every_module_and_config(wheel_names):
  modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "cwm_jax").rglob("*.py")}
  configs = {f"cwm_jax/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
  assert "cwm_jax/configs/base.py" in configs
  assert (modules | configs) <= wheel_names


def test_the_wheel_carries_the_pages_that_lie_beside_modules_and_configs(wheel_names):
  pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "cwm_jax").rglob("*.md")}
  pages |= {f"cwm_jax/configs/{path.name}" for path in (ROOT / "configs").glob("*.md")}
  assert {"cwm_jax/configs/finetune.md", "cwm_jax/counterfactual/segments.md"} <= pages
  assert pages <= wheel_names


def test_the_wheel_carries_the_weights_their_cards_the_test_sets_seeds_and_the_viewers_page(
  wheel_names,
):
  data = {
    path.relative_to(ROOT).as_posix()
    for pattern in (
      "weights/*.safetensors",
      "weights/*.md",
      "data/*.txt",
      "viewer/page.html",
      "viewer/page.js",
    )
    for path in (ROOT / "cwm_jax").glob(pattern)
  }
  page = {"cwm_jax/viewer/page.html", "cwm_jax/viewer/page.js"}
  assert page | {"cwm_jax/data/scenes_test_v1.txt"} <= data
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


# Everything that reads files of the package: weights, configs, seeds, tables of releases, the page.
EVERYTHING = """
import importlib, pkgutil, sys, urllib.request
from threading import Thread
import cwm_jax
from cwm_jax import cli, configs
from cwm_jax.pretrained import releases
from cwm_jax.viewer import command

def do(*arguments):
  code = cli.main(list(arguments))
  assert code == 0, (arguments, code)

names = [module.name for module in pkgutil.iter_modules(configs.__path__)]
for name in names:
  importlib.import_module(f"cwm_jax.configs.{name}").get_config()
assert "pretrain_tiny" in names and "opt-cwm-512" in releases.names()
cwm_jax.Tracker.load("student-tiny")
do("track", sys.argv[1], "--grid", "1", "--masks", "1", "--out", "tracks")
do("eval", "--scenes", "1", "--trackers", "zero", "--set", "evaluate.honesty=False")
tiny = ["optim.warmup=0 steps", "log.eval_every=0 steps", "log.images_every=0 steps"]
do(
  *["train", "run", "--config", "pretrain_tiny:runlocal", "--steps", "1", "--batch", "2"],
  *[argument for key in tiny for argument in ("--set", key)],
)
server = command.make_server(None, 0)
Thread(target=server.serve_forever, daemon=True).start()
assert b"<canvas" in urllib.request.urlopen(server.address).read()
ours = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "cwm_jax"}
elsewhere = [name for name, module in ours.items() if not module.__file__.startswith(sys.prefix)]
assert len(ours) > 50 and not elsewhere, elsewhere
"""


def test_a_wheel_installed_in_an_environment_of_its_own_does_everything(installed, tmp_path):
  clip = viz.write_mp4(tmp_path / "clip.mp4", command_line.frames(3), fps=10)
  done = _outside([installed / "python", "-c", EVERYTHING, clip], tmp_path)
  assert done.returncode == 0, done.stderr
  written = ("tracks/tracks.npz", "tracks/overlay.mp4", "run/model.safetensors")
  assert all((tmp_path / path).stat().st_size for path in written)


def test_an_installed_wheel_brings_its_command(installed, tmp_path):
  done = _outside([installed / "cwm-jax", "info"], tmp_path)
  assert done.returncode == 0, done.stderr
  assert "predictor-tiny" in done.stdout


SCRIPTS = [
  path for path in sorted((ROOT / "launch").iterdir()) if path.is_file() and not path.suffix
]


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

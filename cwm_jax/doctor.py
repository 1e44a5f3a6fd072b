"""`cwm-jax doctor`: what this installation runs on, what is missing, and how to get it.

Whatever may be missing is imported where it is looked at, so that its absence is a finding.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import shutil
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from cwm_jax.types import InputError, first_line

# What is imported of a package that is not called by its own name.
_MODULES = {
  "absl-py": "absl",
  "orbax-checkpoint": "orbax.checkpoint",
  "pillow": "PIL",
}
_EXTRAS = {
  "opencv-python-headless": ("classical trackers to compare with", "baselines"),
  "tensorflow": ("not needed; TFDS data sets are read without it", "tf"),
  "pytest": ("to run the tests", "dev"),
}
_SMALL_DISK = 2 * 2**30  # bytes


class Finding(NamedTuple):
  """One line of the report.

  about: what was looked at.
  found: what was found.
  state: "ok", "note" (something optional is missing) or "missing" (something does not work).
  fix:   what to do; "" where there is nothing to do.
  """

  about: str
  found: str
  state: str
  fix: str = ""


def run(*, as_json: bool) -> int:
  """Prints the report; returns 1 where something that is needed is missing, else 0."""
  findings = list(examine())
  broken = [f for f in findings if f.state == "missing"]
  facts = {"ok": not broken, "findings": [finding._asdict() for finding in findings]}
  width = max(len(finding.about) for finding in findings)
  lines = []
  for about, found, state, fix in findings:
    lines.append(f"{state:<8}{about:<{width}}  {found}")
    if fix:
      lines.append(f"{'':<{width + 10}}{fix}")
  verdict = "all that is needed is here" if not broken else f"{len(broken)} missing"
  print(json.dumps(facts) if as_json else "\n".join([*lines, "", verdict]), flush=True)
  return 1 if broken else 0


def examine() -> Iterator[Finding]:
  """Looks at one thing after the other; nothing raises."""
  python = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
  recent = sys.version_info >= (3, 11)
  yield Finding("Python", python, "ok" if recent else "missing", "" if recent else "3.11 or newer")
  yield Finding("processor", f"{_usable_cores()} cores, {_memory()}", "ok")
  yield from _packages()
  yield from _devices()
  yield from _weights()
  yield from _programs()
  yield _encoder()
  yield from _folders()


def _usable_cores() -> int:
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> str:
  try:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  except (ValueError, OSError, AttributeError):
    return "memory unknown"
  return f"{total / 2**30:.0f} GiB of memory"


def _version(name: str) -> str | None:
  try:
    return metadata.version(name)
  except metadata.PackageNotFoundError:
    return None


def essential() -> list[str]:
  """The names of the packages that this one cannot do without, on this system."""
  checkout = Path(__file__).parents[1] / "pyproject.toml"
  # What an installation notes of a checkout is as old as the installation.
  if checkout.is_file():
    asked = tomllib.loads(checkout.read_text())["project"]["dependencies"]
  else:
    asked = metadata.requires("cwm-jax") or []
  names = []
  for requirement in asked:
    wanted, _, when = requirement.partition(";")
    system = re.search(r"sys_platform == .(\w+)", when)
    if "extra" not in when and (system is None or system[1] == sys.platform):
      names.append(re.match(r"[\w.-]+", wanted)[0])
  return names


def _packages() -> Iterator[Finding]:
  yield Finding("cwm-jax", _version("cwm-jax") or "not installed, run from its folder", "ok")
  for name in essential():
    version = _version(name)
    if version is None:
      yield Finding(name, "absent", "missing", f"pip install {name}")
      continue
    try:
      importlib.import_module(_MODULES.get(name, name.replace("-", "_")))
    # A library that is broken may raise anything.
    except Exception as error:
      found = f"{version}, but it cannot be imported: {first_line(error)}"
      yield Finding(name, found, "missing", f"pip install --force-reinstall {name}")
    else:
      yield Finding(name, version, "ok")
  for name, (what_for, extra) in _EXTRAS.items():
    version = _version(name)
    if version is None:
      fix = f"{what_for}: pip install 'cwm-jax[{extra}]'"
      yield Finding(name, "absent", "note", fix)
    else:
      yield Finding(name, version, "ok")


def _devices() -> Iterator[Finding]:
  try:
    import jax

    devices = jax.devices()
    answer = float(jax.numpy.ones(4).sum())
  except ImportError as error:
    yield Finding("devices", f"JAX cannot be imported: {first_line(error)}", "missing")
    return
  except RuntimeError as error:
    fix = "JAX_PLATFORMS=cpu computes on the processor"
    yield Finding("devices", first_line(error), "missing", fix)
    return
  kinds = ", ".join(sorted({device.device_kind for device in devices}))
  cpu = devices[0].platform == "cpu"
  hint = "with an NVIDIA GPU: pip install 'cwm-jax[cuda13]' (or cuda12); on a TPU: [tpu]"
  yield Finding("devices", f"{len(devices)} x {kinds}", "ok", hint if cpu else "")
  if answer != 4.0:
    yield Finding(
      "arithmetic", f"four ones add up to {answer}", "missing", "the driver is at fault"
    )


def _weights() -> Iterator[Finding]:
  try:
    from cwm_jax.pretrained import releases, weights
  except ImportError as error:
    found = f"cannot be looked at: {first_line(error)}"
    yield Finding("weights", found, "missing", "first get the packages that are missing")
    return
  try:
    path = weights.shipped()
    weights.read_header(path)
    yield Finding("shipped weights", f"{path.name}, {path.stat().st_size / 1e6:.1f} MB", "ok")
  except (InputError, OSError) as error:
    fix = "install the package again; the file is part of it"
    yield Finding("shipped weights", str(error), "missing", fix)
  folder = releases.cache_folder()
  held = sorted(p.stem for p in folder.rglob("*.safetensors")) if folder.is_dir() else []
  found = f"{folder}: {', '.join(held) if held else 'none yet'}"
  fix = "" if held else "fetched when first named, such as --weights opt-cwm-512"
  yield Finding("public releases", found, "ok" if held else "note", fix)


def _programs() -> Iterator[Finding]:
  """Where compiled programs are kept, and whether they can be."""
  try:
    from cwm_jax.pretrained import releases
  except ImportError:
    return  # `_weights` has said so
  own = os.environ.get("JAX_COMPILATION_CACHE_DIR")
  folder = Path(own) if own else releases.cache_folder() / "programs"
  name = "JAX_COMPILATION_CACHE_DIR" if own else "CWM_JAX_CACHE"
  if not _writable(folder):
    fix = f"each command compiles anew; let {name} name a folder that can be written"
    yield Finding("programs", f"{folder} cannot be written", "note", fix)
    return
  kept = sum(1 for path in folder.rglob("*-cache") if path.is_file())
  yield Finding("programs", f"{folder}: {kept} compiled and kept", "ok")


def _writable(folder: Path) -> bool:
  """Whether a folder can be written, or made; nothing is."""
  there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
  return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _encoder() -> Finding:
  try:
    import av

    av.CodecContext.create("libx264", "w")
    return Finding("video", f"FFmpeg with H.264, by PyAV {av.__version__}", "ok")
  except (ImportError, ValueError, OSError) as error:
    return Finding("video", f"no H.264 encoder ({error})", "missing", "pip install av")


def _folders() -> Iterator[Finding]:
  for name, what_for in (("CWM_DATA", "real data"), ("CWM_GOLDENS", "stored reference values")):
    value = os.environ.get(name)
    if not value:
      yield Finding(name, "not set", "note", f"names the folder of {what_for}, for tests")
    else:
      there = Path(value).is_dir()
      yield Finding(name, value, "ok" if there else "note", "" if there else "no such folder")
  try:
    free = shutil.disk_usage(Path.cwd()).free
  except OSError as error:
    yield Finding("disk here", str(error), "missing")
    return
  enough = free > _SMALL_DISK
  fix = "" if enough else "training keeps checkpoints; take a larger disk"
  yield Finding("disk here", f"{free / 2**30:.0f} GiB free", "ok" if enough else "note", fix)

"""`cwm-jax doctor`: what this installation runs on, what is missing, and how to get it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from cwm_jax import commands
from cwm_jax.types import InputError

_ESSENTIAL = (
  "jax",
  "jaxlib",
  "flax",
  "numpy",
  "av",
  "pillow",
  "grain",
  "orbax-checkpoint",
  "optax",
)
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
  commands.report(facts, "\n".join([*lines, "", verdict]), as_json=as_json)
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


def _packages() -> Iterator[Finding]:
  yield Finding("cwm-jax", _version("cwm-jax") or "not installed, run from its folder", "ok")
  for name in _ESSENTIAL:
    version = _version(name)
    if version is None:
      yield Finding(name, "absent", "missing", f"pip install {name}")
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
  except (ImportError, RuntimeError) as error:
    reason = str(error).strip().splitlines()[0]
    yield Finding("devices", reason, "missing", "JAX_PLATFORMS=cpu computes on the processor")
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
  from cwm_jax.pretrained import releases, weights

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

"""Public checkpoints by name: where their files come from, and the weights they become.

The names are in `third_party/*/RELEASE.toml`, which the installed package has as
`cwm_jax.third_party`.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import os
import tomllib
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from absl import logging

from cwm_jax.pretrained import convert, download, torch_file, weights
from cwm_jax.types import InputError

# Changes when the same files are to become another weights file.
_FORMAT = "1"


class File(NamedTuple):
  """One file of a release.

  name:    in its folder of the cache.
  address: where it is published.
  size, sha256: None where the source does not publish them.
  """

  name: str
  address: str
  size: int | None
  sha256: str | None


class Release(NamedTuple):
  """A named checkpoint.

  name:    such as "opt-cwm-512".
  files:   in loading order: a base predictor, then what is laid over it.
  folder:  of the cache that the files lie in.
  title, source, licence: of the project that published them.
  """

  name: str
  files: tuple[File, ...]
  folder: str
  title: str
  source: str
  licence: str


def names() -> list[str]:
  """The names of all releases."""
  return list(_table())


def near(name: str) -> str:
  """A clause with the three names of weights nearest to one that is none, and where all are."""
  known = [*weights.shipped_names(), *names()]
  nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.0)
  return f"the nearest names are {', '.join(nearest)} (cwm-jax info --list shows all)"


def get(name: str) -> Release:
  """A release by its name.

  Raises:
    InputError: an unknown name.
  """
  if name not in _table():
    raise InputError(f"unknown release {name!r}; {near(name)}")
  return _table()[name]


def cache_folder() -> Path:
  """The folder for downloads: CWM_JAX_CACHE, or ~/.cache/cwm_jax."""
  return Path(os.environ.get("CWM_JAX_CACHE") or Path.home() / ".cache" / "cwm_jax")


def fetch(
  release: Release, *, progress: Callable[[str], download.Progress] = download.print_progress
) -> list[Path]:
  """Makes sure that a release's files are in the cache, whole and unchanged.

  A file that was put there by hand is taken as it is. A download goes on where it was interrupted.

  Args:
    release: from `get`.
    progress: makes, for a file's name, what is called as its bytes arrive.

  Returns:
    The files' paths, in loading order.

  Raises:
    InputError: a file cannot be had; the sentence says what to fetch and where to put it.
  """
  paths = {file: _path(release, file) for file in release.files}
  for file, path in paths.items():
    try:
      download.fetch(
        file.address, path, size=file.size, sha256=file.sha256, progress=progress(file.name)
      )
    except InputError as error:
      missing = [f"{f.address} as {p}" for f, p in paths.items() if not p.exists() and f != file]
      also = f"; {release.name} also needs {' and '.join(missing)}" if missing else ""
      raise InputError(f"{error}{also}") from None
  return list(paths.values())


def load(name: str, *, keep_base: bool = False) -> Path:
  """A release as a weights file of ours, fetched and converted where that was not done before.

  Args:
    name: of the release.
    keep_base: see `convert.overlay`.

  Returns:
    The weights file, in the cache.

  Raises:
    InputError: an unknown name, files that cannot be had, or that are not what the name says.
  """
  release = get(name)
  path = _converted(release, keep_base)
  if path is None or not path.is_file():
    sources = fetch(release)
    path = _converted(release, keep_base)
    made = convert.assemble(sources, release=name, keep_base=keep_base)
    for line in made.notes:
      logging.info("%s: %s", name, line)
    weights.save(path, made.params, made.config, extra=made.extra)
  return path


def locate(name_or_path: str | os.PathLike) -> Path:
  """The weights file that somebody means: a path, a release's name, or that of a shipped file.

  Raises:
    InputError: neither; a torch file, which must be converted first; or as `load`.
  """
  path = Path(name_or_path)
  if not path.exists() and str(name_or_path) in names():
    return load(str(name_or_path))
  if not path.exists() and str(name_or_path) in weights.shipped_names():
    return weights.shipped(str(name_or_path))
  if not path.is_file():
    raise InputError(f"there is no weights file {str(path)!r}; {near(path.stem)}")
  if torch_file.is_torch_file(path):
    raise InputError(f"{path} is a torch file; first run: cwm-jax convert {path} OUT.safetensors")
  return path


def _converted(release: Release, keep_base: bool) -> Path | None:
  """Where the converted weights lie; None until the checksums of all sources are known."""
  sums = [download.recorded(_path(release, file)) for file in release.files]
  if None in sums:
    return None
  told = " ".join([_FORMAT, str(keep_base), *map(str, sums)])
  digest = hashlib.sha256(told.encode()).hexdigest()[:12]
  return cache_folder() / release.folder / f"{release.name}.{digest}.safetensors"


def _path(release: Release, file: File) -> Path:
  return cache_folder() / release.folder / file.name


@functools.cache
def _table() -> dict[str, Release]:
  table = {}
  folders = sorted(resources.files("cwm_jax.third_party").iterdir(), key=lambda entry: entry.name)
  for folder in folders:
    if not (folder / "RELEASE.toml").is_file():
      continue
    content = tomllib.loads((folder / "RELEASE.toml").read_text())
    for name, entry in content["releases"].items():
      known = content.get("files", {})
      files = tuple(
        File(
          file,
          content["address"] + file,
          known.get(file, {}).get("size"),
          known.get(file, {}).get("sha256"),
        )
        for file in entry["files"]
      )
      facts = (content[key] for key in ("title", "source", "licence"))
      table[name] = Release(name, files, folder.name, *facts)
  return table

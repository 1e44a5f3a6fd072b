"""Which files a source reads: folders walked recursively, list files, single files.

Nothing is opened here; a file that proves to be unusable is met when it is read.
"""

from __future__ import annotations

import os
from pathlib import Path

from absl import logging

from cwm_jax.data.images import IMAGE_SUFFIXES, check_not_url, natural_key, shown
from cwm_jax.data.video import VIDEO_SUFFIXES
from cwm_jax.types import InputError

_LIST_SUFFIXES = frozenset({".txt", ".lst", ".list"})


def list_videos(paths: str | os.PathLike[str]) -> list[str]:
  """Files that may be videos.

  Args:
    paths: a folder (walked recursively; files are chosen by their suffix), a list file (.txt, .lst,
      .list: one path a line, relative to the list's own folder; blank lines and lines that begin
      with # are passed over), or one video file.

  Raises:
    InputError: nothing at `paths`, a URL, an unreadable list, or no file found.
  """
  check_not_url(paths)
  if os.path.isdir(paths):
    found, others = [], []
    for path in _walk(paths):
      (found if Path(path).suffix.lower() in VIDEO_SUFFIXES else others).append(path)
    if others:
      logging.info(
        "%s: %d files without a video suffix are left out, such as %s",
        shown(paths),
        len(others),
        shown(others[0]),
      )
    if not found:
      raise InputError(f"{shown(paths)} holds no video files ({', '.join(sorted(VIDEO_SUFFIXES))})")
    return found
  if Path(paths).suffix.lower() in _LIST_SUFFIXES:
    return _read_list(paths)
  if not os.path.isfile(paths):
    raise InputError(
      f"{shown(paths)} does not exist; name a folder of videos, a list file (.txt) or a video"
    )
  return [os.fspath(paths)]


def list_frame_folders(paths: str | os.PathLike[str]) -> list[str]:
  """Folders that hold frames: `paths` itself, or every folder below it that holds image files.

  Raises:
    InputError: `paths` is not a folder, or no image file lies in it or below it.
  """
  found = {os.path.dirname(path) for path in list_photos(paths)}
  return sorted(found, key=natural_key)


def list_photos(folder: str | os.PathLike[str]) -> list[str]:
  """Image files of a folder and the folders below it, in natural order.

  Raises:
    InputError: it is not a folder, or holds no image file.
  """
  check_not_url(folder)
  if not os.path.isdir(folder):
    kind = "is not a folder" if os.path.exists(folder) else "does not exist"
    raise InputError(f"{shown(folder)} {kind}; a folder of images is needed")
  found = [path for path in _walk(folder) if Path(path).suffix.lower() in IMAGE_SUFFIXES]
  if not found:
    raise InputError(f"{shown(folder)} holds no image files ({', '.join(sorted(IMAGE_SUFFIXES))})")
  return found


def _walk(folder: str | os.PathLike[str]) -> list[str]:
  """Files below a folder in natural order; links to folders are followed, once each."""
  files, visited = [], set()

  def unreadable(error: OSError) -> None:
    logging.warning("%s cannot be listed and is left out: %s", error.filename, error.strerror)

  for here, folders, names in os.walk(folder, followlinks=True, onerror=unreadable):
    real = os.path.realpath(here)
    if real in visited:  # a link that leads back up would never end
      folders.clear()
      continue
    visited.add(real)
    folders[:] = sorted((f for f in folders if not f.startswith(".")), key=natural_key)
    files += [os.path.join(here, name) for name in names if not name.startswith(".")]
  return sorted(files, key=natural_key)


def _read_list(path: str | os.PathLike[str]) -> list[str]:
  if not os.path.isfile(path):
    raise InputError(f"list file {shown(path)} does not exist")
  try:
    lines = Path(path).read_text(encoding="utf-8").splitlines()
  except (OSError, UnicodeError) as error:
    raise InputError(f"list file {shown(path)} cannot be read as text: {error}") from error
  entries = [line.strip() for line in lines]
  entries = [entry for entry in entries if entry and not entry.startswith("#")]
  if not entries:
    raise InputError(f"list file {shown(path)} names no files; write one path a line")
  root = os.path.dirname(os.path.abspath(path))
  return [entry if "://" in entry else os.path.join(root, entry) for entry in entries]

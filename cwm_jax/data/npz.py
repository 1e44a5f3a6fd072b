"""Reads `.npz` files of arrays: what a member would unpack to is known before it is unpacked."""

from __future__ import annotations

import io
import math
import os
import zipfile
from collections.abc import Sequence

import numpy as np

from cwm_jax.data.images import shown
from cwm_jax.types import InputError

MAX_BYTES = 1 << 28  # of all arrays asked for together, unpacked


def load_arrays(
  path: str | os.PathLike[str] | io.BytesIO, names: Sequence[str], *, where: str = ""
) -> dict[str, np.ndarray]:
  """Reads some arrays of a `.npz` file. Never unpickles.

  Args:
    path: the file, or its bytes.
    names: the arrays to read; others are left alone.
    where: what errors call it; "" takes the path.

  Returns:
    name -> array.

  Raises:
    InputError: no such file, damaged, without one of the arrays, arrays of objects, or more than
      `MAX_BYTES` of them.
  """
  where = where or shown(path)
  try:
    with zipfile.ZipFile(path) as archive:
      members = {name: archive.getinfo(f"{name}.npy") for name in names}
      if sum(member.file_size for member in members.values()) > MAX_BYTES:
        raise InputError(f"{where} unpacks to more than {MAX_BYTES >> 20} MiB, too much for tracks")
      return {name: _array(archive, member, where) for name, member in members.items()}
  except InputError:
    raise
  except KeyError as error:
    raise InputError(f"{where} lacks an array: {error.args[0]}") from None
  # Damaged archives raise errors of zip, zlib and NumPy's own header reader, of many kinds.
  except Exception as error:
    reason = " ".join(str(error).split()) or type(error).__name__
    raise InputError(f"{where} cannot be read as an .npz file of arrays: {reason[:200]}") from None


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo, where: str) -> np.ndarray:
  with archive.open(member) as file:
    raw = file.read(member.file_size)
  stream = io.BytesIO(raw)
  version = np.lib.format.read_magic(stream)
  read = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
  }
  if version not in read:
    raise InputError(f"{where} cannot be read as an .npz file of arrays: its version is {version}")
  shape, fortran, dtype = read[version](stream)
  start = stream.tell()
  if dtype.hasobject:
    raise InputError(f"{where} cannot be read as an .npz file of arrays: it holds objects")
  if math.prod(shape) * dtype.itemsize != len(raw) - start or not dtype.itemsize:
    raise InputError(
      f"{where} cannot be read as an .npz file of arrays: {list(shape)} does not fit its bytes"
    )
  values = np.frombuffer(raw, dtype, offset=start)
  return values.reshape(shape, order="F" if fortran else "C").copy(order="K")

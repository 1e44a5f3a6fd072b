"""Image files: what their numbers mean, whatever they are stored as."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from cwm_jax.data import images
from cwm_jax.types import InputError

# Black, white, and levels between which 8 bits tell nothing apart.
RAMP = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)


def _saved(path, array, **options):
  if path.suffix == ".ppm":
    path.write_bytes(b"P5 8 8 65535\n" + array.astype(">u2").tobytes())
  else:
    Image.fromarray(array).save(path, **options)
  return path


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.ppm"])
def test_grey_of_16_bits_keeps_its_whole_range(tmp_path, name):
  found = images.read_image(_saved(tmp_path / name, RAMP))
  assert found.dtype == np.uint8 and found.shape == (8, 8, 3)
  np.testing.assert_array_equal(
    found, np.round(RAMP / 257).astype(np.uint8)[..., None].repeat(3, 2)
  )
  assert found.min() == 0 and found.max() == 255 and len(np.unique(found)) == 64


def test_grey_of_16_bits_is_turned_as_its_exif_says_and_black_where_it_is_transparent(tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 6
  path = _saved(tmp_path / "a.png", RAMP, exif=exif, transparency=int(RAMP[-1, -1]))
  found = images.read_image(path)[..., 0]
  wanted = np.round(np.rot90(RAMP, -1) / 257)
  wanted[-1, 0] = 0
  np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
  "array, kind",
  [((RAMP / 65535).astype(np.float32), "floating-point"), (RAMP.astype(np.int32), "32-bit")],
)
def test_numbers_without_a_known_white_are_refused(tmp_path, array, kind):
  with pytest.raises(InputError, match=f"a.tif holds {kind} numbers, .* save it with 8 or 16 bits"):
    images.read_image(_saved(tmp_path / "a.tif", array))

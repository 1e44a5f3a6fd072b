"""Annotated clips and flow files: values, conventions, round trips, the real ones."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from PIL import Image

from cwm_jax.data import flowfiles, tapvid, tapvid_queries
from cwm_jax.types import InputError


def test_the_real_annotated_clips_are_read(cwm_data):
  source = tapvid.ClipFolders(cwm_data / "tapvid_davis")
  clips = {name: source.read(index) for index, name in enumerate(source.names)}
  assert {name: len(clip.points_xy) for name, clip in clips.items()} == {
    "car-shadow": 25,
    "dog": 9,
    "judo": 25,
  }
  for clip in clips.values():
    assert clip.video.shape == (32, 480, 854, 3) and clip.video.dtype == np.uint8
    visible = clip.points_xy[~clip.occluded]
    assert visible.min() >= 0 and np.all(visible <= (854, 480))
  assert len(tapvid_queries.queries_cfg(clips["dog"], gap=5).point) == 207


def test_flo_is_what_middlebury_says(tmp_path):
  values = np.array([1.5, -2.0, 3.0, 4.0, 2e9, 0.0, np.nan, 1.0], "<f4")
  (tmp_path / "a.flo").write_bytes(b"PIEH" + struct.pack("<ii", 2, 2) + values.tobytes())
  flow, valid = flowfiles.read_flo(tmp_path / "a.flo")
  np.testing.assert_array_equal(flow[0], [[1.5, -2.0], [3.0, 4.0]])
  np.testing.assert_array_equal(valid, [[True, True], [False, False]])
  np.testing.assert_array_equal(flow[1], 0)


def test_flow_survives_writing_and_reading(tmp_path):
  rng = np.random.default_rng(0)
  flow = (rng.normal(size=(7, 9, 2)) * 40).astype(np.float32)
  valid = rng.random((7, 9)) > 0.3
  flowfiles.write_flo(tmp_path / "a.flo", flow, valid)
  read, read_valid = flowfiles.read_flo(tmp_path / "a.flo")
  np.testing.assert_array_equal(read, np.where(valid[..., None], flow, 0))
  np.testing.assert_array_equal(read_valid, valid)
  flowfiles.write_kitti(tmp_path / "a.png", flow, valid)
  read, read_valid = flowfiles.read_kitti(tmp_path / "a.png")
  np.testing.assert_allclose(read, np.where(valid[..., None], flow, 0), atol=0.5 / 64)
  np.testing.assert_array_equal(read_valid, valid)
  with pytest.raises(InputError, match="does not fit KITTI's format"):
    flowfiles.write_kitti(tmp_path / "b.png", flow + 600)


def test_a_kitti_file_is_a_png_with_its_values_in_sixteen_bits(tmp_path):
  flowfiles.write_kitti(tmp_path / "a.png", np.full((5, 6, 2), (1.0, -2.0)))
  with Image.open(tmp_path / "a.png") as image:
    assert image.format == "PNG" and image.size == (6, 5)
    # Pillow shows the upper bytes: 2**15 + 64 and 2**15 - 128, and 1.
    assert image.convert("RGB").getpixel((0, 0)) == (128, 127, 0)


def test_the_real_flow_pairs_are_read_and_warp_onto_each_other(cwm_data):
  lengths = {}
  for pair in flowfiles.iter_flow_pairs(cwm_data / "flow_gt"):
    lengths[pair.name] = np.linalg.norm(pair.flow_xy, axis=-1)[pair.valid].mean()
    # Frame 2 looked up where the flow points is nearer to frame 1 than frame 2 as it stands.
    h, w = pair.valid.shape
    to = (np.mgrid[:h, :w][::-1].transpose(1, 2, 0) + pair.flow_xy).round().astype(int)
    inside = pair.valid & np.all((to >= 0) & (to < (w, h)), axis=-1)
    moved = pair.frame2[to[..., 1][inside], to[..., 0][inside]].astype(int)
    still = pair.frame2[inside].astype(int)
    here = pair.frame1[inside].astype(int)
    assert np.abs(moved - here).mean() < 0.6 * np.abs(still - here).mean(), pair.name
  assert lengths == pytest.approx(
    {
      "flyingchairs/00001_flow": 4.31,
      "flyingchairs/00002_flow": 2.11,
      "middlebury/Grove2/flow10": 3.09,
      "middlebury/RubberWhale/flow10": 1.26,
      "middlebury/Urban2/flow10": 8.39,
      "middlebury/Venus/flow10": 3.80,
      "sintel_alley_1/frame_0001": 2.80,
    },
    abs=0.01,
  )


def test_kitti_s_truth_goes_with_its_frames(tmp_path):
  """Truth of all pixels is taken before that of pixels seen twice, whose folder can be named."""
  truths = {"flow_occ": 2.0, "flow_noc": 3.0}
  for folder in (*truths, "image_2", "flow_viz"):
    (tmp_path / "training" / folder).mkdir(parents=True)
  for number, size in (("000001", (7, 5)), ("000000", (8, 6))):
    for frame, grey in (("10", 40), ("11", 80)):
      path = tmp_path / "training" / "image_2" / f"{number}_{frame}.png"
      Image.new("RGB", size, (grey,) * 3).save(path)
      Image.new("RGB", size).save(tmp_path / "training" / "flow_viz" / path.name)
    valid = np.arange(size[0]) < 3
    for folder, dx in truths.items():
      flow = np.full((size[1], size[0], 2), (dx, -1.0))
      path = tmp_path / "training" / folder / f"{number}_10.png"
      flowfiles.write_kitti(path, flow, np.broadcast_to(valid, flow.shape[:2]))
  pairs = list(flowfiles.iter_flow_pairs(tmp_path))
  assert [pair.name for pair in pairs] == [f"training/flow_occ/00000{i}_10" for i in (0, 1)]
  first = pairs[0]
  assert first.frame1.shape == (6, 8, 3)
  assert (first.frame1 == 40).all() and (first.frame2 == 80).all()
  np.testing.assert_array_equal(first.flow_xy[:, :3], np.broadcast_to((2.0, -1.0), (6, 3, 2)))
  assert first.valid[:, :3].all() and not first.valid[:, 3:].any()
  (tmp_path / "training" / "image_2" / "000001_11.png").unlink()
  seen_twice = flowfiles.iter_flow_pairs(tmp_path / "training" / "flow_noc")
  assert next(seen_twice).flow_xy[0, 0, 0] == 3.0
  with pytest.raises(InputError, match="no images 000001_10.png and 000001_11.png.* image_2"):
    next(seen_twice)

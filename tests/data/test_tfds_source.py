"""TFDS datasets in ArrayRecord form, read without TensorFlow."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from cwm_jax.data import tfds_source
from cwm_jax.data.tfds_source import TfdsSource
from cwm_jax.types import InputError

tfds = pytest.importorskip("tensorflow_datasets")

LENGTHS = [6, 1, 4]  # the second one is too short


def _png(image):
  data = io.BytesIO()
  Image.fromarray(image).save(data, "PNG")
  data.seek(0)
  return data


@pytest.fixture
def prepared(tmp_path, movies):
  """Three records: the same frames as a sequence of images and as a video file."""

  class TinyVideos(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      return tfds.core.DatasetInfo(
        builder=self,
        features=tfds.features.FeaturesDict(
          {
            "frames": tfds.features.Sequence(tfds.features.Image(shape=(48, 64, 3))),
            "file": tfds.features.Text(),
            "label": tfds.features.Scalar(np.int64),
          }
        ),
      )

    def _split_generators(self, dl_manager):
      return {"train": self._generate_examples()}

    def _generate_examples(self):
      for i, length in enumerate(LENGTHS):
        path = movies.write_video(tmp_path / f"{i}.mp4", length)
        frames = [_png(movies.picture(k)) for k in range(length)]
        yield i, {"frames": frames, "file": path.read_bytes(), "label": i}

  builder = TinyVideos(data_dir=str(tmp_path / "data"), file_format="array_record")
  builder.download_and_prepare()
  return str(builder.data_path)


def _source(folder, **options):
  pairs = dict(image_hw=(48, 64), seed=0, crop="centre", flip=False)
  return TfdsSource("", data_dir=folder, **options, **pairs)


@pytest.mark.parametrize("feature", ["", "file"])
def test_pairs_come_from_images_and_from_video_files(prepared, movies, feature):
  source = _source(prepared, feature=feature, gap=3)
  assert source.items == 3
  skipped = []
  for position in range(12):
    example = source.example(position, position % 3)
    first, second = (movies.number_of(frame) for frame in example["frames"])
    assert second - first == 3
    skipped.append(int(example["skipped"]))
  assert sum(skipped) == 4  # the record that is too short had its turn four times


def test_encoded_images_and_videos_are_turned_upright(movies, tmp_path):
  path = movies.write_video(tmp_path / "turned.mp4", 2, rotation=90)
  frames = tfds_source.decode_video(path.read_bytes(), "a record")
  assert [frame.shape for frame in frames] == [(64, 48, 3)] * 2
  image, data = Image.fromarray(movies.picture(1)), io.BytesIO()
  exif = image.getexif()
  exif[0x0112] = 6  # the camera was held on its side
  image.save(data, "JPEG", exif=exif)
  assert tfds_source.as_image(data.getvalue(), "a record").shape == (64, 48, 3)


def test_a_missing_field_or_dataset_is_named(prepared, tmp_path):
  with pytest.raises(InputError, match="has no field clip; it has file, frames, label"):
    _source(prepared, feature="clip")
  with pytest.raises(InputError, match="cannot be opened"):
    _source(str(tmp_path / "nowhere"))
  with pytest.raises(InputError, match="cannot be opened"):
    _source(prepared, split="test")
  with pytest.raises(InputError, match="cannot be opened"):
    TfdsSource("no_such_dataset", image_hw=(8, 8), seed=0, crop="centre", flip=False)
  with pytest.raises(InputError, match="the field label is a number, not a video"):
    _source(prepared, feature="label").read(0, np.random.default_rng(0))


def test_a_record_is_read_without_loading_tensorflow(prepared):
  code = (
    "import sys; from cwm_jax.data.tfds_source import TfdsSource\n"
    f"s = TfdsSource('', data_dir={prepared!r}, image_hw=(8, 8), seed=0, crop='centre',"
    " flip=False)\n"
    "print(s.example(0, 0)['frames'].shape, 'tensorflow' in sys.modules)"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
  assert done.stdout.strip() == "(2, 8, 8, 3) False", done.stderr[-2000:]

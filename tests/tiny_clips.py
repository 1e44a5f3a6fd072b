"""Videos small enough for tests: a few grey frames of 32 x 24 pixels."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np


def write_video(path, frames, grey):
  """A film at 10 frames a second whose frame i has the grey level `grey` + 10 i."""
  with av.open(str(path), "w") as container:
    stream = container.add_stream("libx264", rate=10)
    stream.width, stream.height, stream.pix_fmt = 32, 24, "yuv420p"
    for i in range(frames):
      picture = np.full((24, 32, 3), grey + 10 * i, np.uint8)
      frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
      frame.pts, frame.time_base = i, Fraction(1, 10)
      container.mux(stream.encode(frame))
    container.mux(stream.encode())

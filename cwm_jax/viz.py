"""Pictures: flow colours, heat maps, tracks drawn on video, labelled pages; PNG and MP4 writers.

Arrays in, arrays out: images are uint8 [H, W, 3], RGB; coordinates are continuous (x, y) pixels of
the image that they are drawn on (a pixel's centre is index + 0.5).
"""

from __future__ import annotations

import colorsys
import os
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from cwm_jax import whole_files
from cwm_jax.types import InputError

# The wheel of the Middlebury flow benchmark: steps from each primary colour to the next.
_WHEEL = (
  (15, (255, 0, 0)),
  (6, (255, 255, 0)),
  (4, (0, 255, 0)),
  (11, (0, 255, 255)),
  (13, (0, 0, 255)),
  (6, (255, 0, 255)),
)
# From nothing to much: black, violet, red, orange, pale yellow; lightness rises evenly.
_HEAT = ((0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 190))

_PAPER, _INK, _FAINT = (255, 255, 255), (28, 28, 32), (110, 110, 120)
_MARGIN = 24
GAP = 14  # between the pictures of a page, pixels
_TITLE, _LABEL = 20, 14  # font sizes, pixels
_TICK = Fraction(1, 90_000)  # seconds: of the times in a video that is not evenly spaced
_SMOOTH = 2  # drawings are made this many times larger and averaged down


def flow_colours(
  flow_xy: Float[np.ndarray, "h w 2"], *, longest: float | None = None
) -> UInt8[np.ndarray, "h w 3"]:
  """Flow as colour: hue is direction, saturation is length (the Middlebury wheel).

  Args:
    flow_xy: (dx, dy), pixels; not-finite entries come out black.
    longest: length drawn in full colour (longer ones are darkened); None takes the field's own.
  """
  known = np.isfinite(flow_xy).all(axis=-1)
  flow = np.where(known[..., None], flow_xy, 0.0)
  length = np.hypot(flow[..., 0], flow[..., 1])
  if longest is None:
    longest = float(length.max(initial=0.0))
  length = length / max(longest, 1e-9)
  wheel = _wheel()
  # Red is direction (1, 0); angles grow from x to y, which points down. As published, a whole turn
  # spans one step less than the wheel has.
  place = (np.arctan2(-flow[..., 1], -flow[..., 0]) / np.pi + 1) / 2 * (len(wheel) - 1)
  low = np.floor(place).astype(int)
  share = (place - low)[..., None]
  full = wheel[low] * (1 - share) + wheel[(low + 1) % len(wheel)] * share
  inside = 1 - length[..., None] * (1 - full)
  colours = np.where(length[..., None] <= 1, inside, full * 0.75)
  return _to_bytes(np.where(known[..., None], colours, 0.0))


def flow_wheel(size: int) -> UInt8[np.ndarray, "s s 3"]:
  """The key to `flow_colours`: every direction from the centre, full length at the rim."""
  line = (np.arange(size) + 0.5) / size * 2 - 1
  x, y = np.meshgrid(line, line)
  colours = flow_colours(np.stack([x, y], axis=-1), longest=1.0) / 255.0
  rim = np.clip((1 - np.hypot(x, y)) * size / 2, 0, 1)[..., None]
  return _to_bytes(colours * rim + np.array(_PAPER) / 255.0 * (1 - rim))


def spread(
  values: Float[np.ndarray, "gh gw c"],
  points_xy: Float[np.ndarray, "gh gw 2"],
  size_hw: tuple[int, int],
) -> Float[np.ndarray, "h w c"]:
  """Values known on a grid of points, bilinearly at every pixel; the border's values go on outside.

  Args:
    points_xy: the grid's (x, y) in pixels; x may depend on the column only, y on the row only.
  """
  h, w = size_hw
  rows = _between(points_xy[:, 0, 1], np.arange(h) + 0.5)
  columns = _between(points_xy[0, :, 0], np.arange(w) + 0.5)
  return np.einsum("hi,wj,ijc->hwc", rows, columns, values, optimize=True).astype(np.float32)


def heat_colours(
  heat: Float[np.ndarray, "h w"], *, top: float | None = None
) -> UInt8[np.ndarray, "h w 3"]:
  """A heat map from black (0) over red to pale yellow (`top`; None takes the map's maximum)."""
  top = float(heat.max(initial=0.0)) if top is None else top
  anchors = np.array(_HEAT) / 255.0
  place = np.clip(heat / max(top, 1e-12), 0, 1) * (len(anchors) - 1)
  grid = np.arange(len(anchors))
  return _to_bytes(np.stack([np.interp(place, grid, anchors[:, c]) for c in range(3)], axis=-1))


def heat_over(
  image: UInt8[np.ndarray, "h w 3"],
  heat: Float[np.ndarray, "h2 w2"],
  *,
  top: float | None = None,
) -> UInt8[np.ndarray, "h w 3"]:
  """Lays a heat map (of any size) over a dimmed grey copy of the image."""
  h, w = image.shape[:2]
  top = float(heat.max(initial=0.0)) if top is None else top
  share = np.clip(resized(heat.astype(np.float32), (h, w)) / max(top, 1e-12), 0, 1)
  grey = np.repeat(image.mean(axis=-1, keepdims=True), 3, axis=-1) * 0.55
  weight = np.sqrt(share)[..., None]
  mixed = grey * (1 - weight) + heat_colours(share, top=1.0) * weight
  return _to_bytes(mixed / 255.0)


def resized(image: np.ndarray, size_hw: tuple[int, int], *, smooth: bool = True) -> np.ndarray:
  """Resizes uint8 [H, W, 3] or float32 [H, W] for showing; `smooth=False` keeps pixels square."""
  if image.shape[:2] == tuple(size_hw):
    return image
  method = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
  picture = Image.fromarray(image).resize((size_hw[1], size_hw[0]), method)
  return np.asarray(picture)


def track_colours(count: int) -> list[tuple[int, int, int]]:
  """`count` colours that are easy to tell apart: hues a golden angle apart, two lightnesses."""
  colours = []
  for i in range(count):
    hue = (0.02 + i * 0.6180339887) % 1.0
    red, green, blue = colorsys.hls_to_rgb(hue, (0.62, 0.5)[i % 2], 0.95)
    colours.append((round(red * 255), round(green * 255), round(blue * 255)))
  return colours


def draw_points(
  image: UInt8[np.ndarray, "h w 3"],
  points_xy: Float[np.ndarray, "n 2"],
  *,
  visible: Bool[np.ndarray, " n"] | None = None,
  truth_xy: Float[np.ndarray, "n 2"] | None = None,
  from_xy: Float[np.ndarray, "n 2"] | None = None,
  colours: Sequence[tuple[int, int, int]] | None = None,
  radius: float | None = None,
) -> UInt8[np.ndarray, "h w 3"]:
  """Draws one mark a point: a disc, hollow where not visible; the truth as a thin cross.

  Args:
    visible: None draws every point as visible.
    truth_xy: not-finite rows draw no cross.
    from_xy: draws a line from here to the point.
    colours: one a point; None takes `track_colours`.
    radius: of the discs, pixels; None suits the image's size.
  """
  count = len(points_xy)
  seen = np.ones(count, bool) if visible is None else visible
  tails = None if from_xy is None else np.stack([from_xy, points_xy], axis=1)
  return _draw(image, points_xy, seen, truth_xy, tails, colours or track_colours(count), radius)


def draw_tracks(
  frames: Iterable[UInt8[np.ndarray, "h w 3"]],
  tracks_xy: Float[np.ndarray, "n t 2"],
  visible: Bool[np.ndarray, "n t"],
  *,
  starts: Sequence[int] | None = None,
  truth_xy: Float[np.ndarray, "n t 2"] | None = None,
  scale: int = 1,
  tail: int = 12,
) -> Iterator[UInt8[np.ndarray, "h2 w2 3"]]:
  """Draws tracks on a video: a mark a point (hollow while occluded), a tail that fades, the truth.

  Args:
    frames: one at a time, so that a long video needs no memory; as many as the tracks have.
    starts: frame of each point's query; nothing is drawn before it. None: all begin at frame 0.
    truth_xy: true tracks, drawn as thin crosses; not-finite ones are left out.
    scale: the frames are enlarged this many times first.
    tail: frames that a tail looks back.
  """
  colours = track_colours(len(visible))
  begin = np.zeros(len(visible), int) if starts is None else np.asarray(starts)
  for t, frame in enumerate(frames):
    h, w = frame.shape[0] * scale, frame.shape[1] * scale
    shown = np.flatnonzero(begin <= t)
    first = max(0, t - tail)
    tails = tracks_xy[shown, first : t + 1] * scale
    for row, point in enumerate(shown):
      # Before its query a point rests on it, so that no tail comes from elsewhere.
      tails[row, : max(0, begin[point] - first)] = tracks_xy[point, begin[point]] * scale
    yield _draw(
      resized(frame, (h, w)),
      tracks_xy[shown, t] * scale,
      visible[shown, t],
      None if truth_xy is None else truth_xy[shown, t] * scale,
      tails,
      [colours[i] for i in shown],
      None,
    )


def page(
  rows: Sequence[Sequence[tuple[str, UInt8[np.ndarray, "_ _ 3"]]]], *, title: str, note: str = ""
) -> UInt8[np.ndarray, "h w 3"]:
  """Sets labelled pictures in rows on white paper, a title above and a note below.

  Args:
    rows: rows of (label, picture); a label may hold a line break.
    note: one or more lines of small print.
  """
  fonts = {size: ImageFont.load_default(size) for size in (_TITLE, _LABEL)}
  line = _LABEL + 5
  label_heights = [max(label.count("\n") + 1 for label, _ in row) * line for row in rows]
  widths = [sum(p.shape[1] for _, p in row) + GAP * (len(row) - 1) for row in rows]
  heights = [
    label + max(p.shape[0] for _, p in row) + GAP + 4 for label, row in zip(label_heights, rows)
  ]
  note_lines = note.split("\n") if note else []
  text_width = max(
    fonts[_TITLE].getlength(title), *(fonts[_LABEL].getlength(text) for text in ["", *note_lines])
  )
  width = int(max(*widths, text_width) if len(widths) > 1 else max(widths[0], text_width))
  top = _MARGIN + _TITLE + 16
  height = top + sum(heights) + line * len(note_lines) + _MARGIN - (0 if note_lines else GAP)
  sheet = Image.new("RGB", (width + 2 * _MARGIN, height), _PAPER)
  pen = ImageDraw.Draw(sheet)
  pen.text((_MARGIN, _MARGIN - 4), title, _INK, fonts[_TITLE])
  y = top
  for row, label_height, row_height in zip(rows, label_heights, heights):
    x = _MARGIN
    for label, picture in row:
      pen.multiline_text((x, y), label, _INK, fonts[_LABEL], spacing=3)
      sheet.paste(Image.fromarray(picture), (x, y + label_height))
      x += picture.shape[1] + GAP
    y += row_height
  for text in note_lines:
    pen.text((_MARGIN, y), text, _FAINT, fonts[_LABEL])
    y += line
  return np.asarray(sheet)


def write_png(path: str | os.PathLike, image: UInt8[np.ndarray, "h w 3"]) -> Path:
  """Writes a PNG, whole or not at all.

  Raises:
    InputError: the path cannot be written; its cause is the system's error.
  """
  path = Path(path)
  try:
    with whole_files.writing(path) as partial:
      Image.fromarray(image).save(partial, format="PNG")
  except OSError as error:
    reason = error.strerror or error
    cause = OSError(error.errno, reason, os.fspath(path))
    raise InputError(f"cannot write {path}: {reason}") from cause
  return path


def partial_path(path: Path) -> Path:
  """Where `write_mp4` writes until the file is whole."""
  return path.with_name(f"{path.name}.{os.getpid()}.partial")


def write_mp4(
  path: str | os.PathLike,
  frames: Iterable[UInt8[np.ndarray, "h w 3"]],
  *,
  fps: float,
  times_s: Sequence[float] | None = None,
) -> Path:
  """Writes an H.264 MP4 that browsers play (yuv420p; an odd last row or column is repeated).

  Args:
    fps: frames a second.
    times_s: when each frame comes on display, seconds, ascending; None spaces them evenly.

  Raises:
    InputError: the path cannot be written, there are no frames, or H.264 cannot hold them.
  """
  path = Path(path)
  partial = partial_path(path)
  try:
    with av.open(str(partial), "w", format="mp4", options={"movflags": "faststart"}) as container:
      stream = None
      for count, frame in enumerate(frames):
        h, w = frame.shape[:2]
        even = np.pad(frame, ((0, h % 2), (0, w % 2), (0, 0)), mode="edge")
        if stream is None:
          rate = Fraction(fps).limit_denominator(1001)
          stream = container.add_stream("libx264", rate=rate, options={"crf": "17"})
          stream.height, stream.width, stream.pix_fmt = *even.shape[:2], "yuv420p"
          if times_s is not None:
            stream.codec_context.time_base = _TICK
        drawn = av.VideoFrame.from_ndarray(even, format="rgb24")
        if times_s is not None:
          drawn.pts, drawn.time_base = round((times_s[count] - times_s[0]) / _TICK), _TICK
        container.mux(stream.encode(drawn))
      if stream is None:
        raise InputError(f"no frames to write to {path}")
      container.mux(stream.encode())
    os.replace(partial, path)
  # Not all that FFmpeg raises is an OSError.
  except (OSError, av.FFmpegError) as error:
    raise InputError(f"cannot write {path}: {error.strerror or error}") from None
  finally:
    partial.unlink(missing_ok=True)
  return path


def _wheel() -> np.ndarray:
  """[55, 3] in [0, 1]: the colours once round the wheel."""
  starts = np.array([colour for _, colour in _WHEEL], float) / 255.0
  parts = []
  for i, (steps, _) in enumerate(_WHEEL):
    share = np.arange(steps)[:, None] / steps
    parts.append(starts[i] * (1 - share) + starts[(i + 1) % len(starts)] * share)
  return np.concatenate(parts)


def _between(known: np.ndarray, wanted: np.ndarray) -> np.ndarray:
  """[wanted, known]: the weights of linear interpolation, constant beyond the ends."""
  return np.stack([np.interp(wanted, known, row) for row in np.eye(len(known))], axis=1)


def _to_bytes(values: np.ndarray) -> np.ndarray:
  return np.round(np.clip(values, 0.0, 1.0) * 255).astype(np.uint8)


def _draw(image, points_xy, seen, truth_xy, tails, colours, radius):
  """The one place that draws points; `tails` is [n, k, 2], oldest first, or None."""
  h, w = image.shape[:2]
  radius = _SMOOTH * (max(3.0, min(h, w) / 95) if radius is None else radius)
  rim, dark = max(1, round(radius * 0.2)), (12, 12, 16, 255)
  layer = Image.new("RGBA", (w * _SMOOTH, h * _SMOOTH), (0, 0, 0, 0))
  pen = ImageDraw.Draw(layer)
  # All tails before any mark, oldest parts first, so that what is newest lies on top.
  for k in range(0 if tails is None else tails.shape[1] - 1):
    fade = round(255 * (k + 1) / (tails.shape[1] - 1))
    for path, colour in zip(tails * _SMOOTH, colours):
      pen.line([*path[k], *path[k + 1]], (*colour, fade), round(radius * 0.7))
  for (x, y), is_seen, colour in zip(points_xy * _SMOOTH, seen, colours):
    if is_seen:
      pen.circle((x, y), radius + rim, fill=dark)
      pen.circle((x, y), radius, fill=(*colour, 255))
    else:
      pen.circle((x, y), radius * 1.3 + rim, outline=dark, width=round(radius * 0.5) + 2 * rim)
      pen.circle((x, y), radius * 1.3, outline=(*colour, 255), width=round(radius * 0.5))
  if truth_xy is not None:
    for x, y in truth_xy[np.isfinite(truth_xy).all(axis=-1)] * _SMOOTH:
      for colour, width in ((dark, 3 * rim), ((255, 255, 255, 255), rim)):
        arm = radius * 1.6 + width / 2
        pen.line([x - arm, y, x + arm, y], colour, width)
        pen.line([x, y - arm, x, y + arm], colour, width)
  # Averaging must weigh colours by their opacity, or transparent black shows as dark fringes.
  small = layer.convert("RGBa").resize((w, h), Image.Resampling.BOX).convert("RGBA")
  return np.asarray(Image.alpha_composite(Image.fromarray(image).convert("RGBA"), small))[..., :3]

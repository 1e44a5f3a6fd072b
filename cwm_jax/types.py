"""The data that flows through the house: shapes, ranges and coordinate order, stated once.

Everything here is a `NamedTuple`, so everything is a JAX pytree. Batch axes are written `B`
(pairs), `N` (points), `T` (frames); images are `[H, W, 3]`, RGB.
"""

from __future__ import annotations

from typing import Any, NamedTuple

Array = Any  # a numpy or jax array; shapes stand beside each field


class PointLabels(NamedTuple):
  """What a tracker said of some points of frame 1, for training; none of it is truth.

  points_xy:  float32 [..., N, 2], continuous pixels of frame 1.
  flow_xy:    float32 [..., N, 2], pixels, to where the tracker found them in frame 2.
  confidence: float32 [..., N] in [0, 1], the tracker's own.
  visible:    bool [..., N], whether the tracker took them for visible in frame 2.
  round_trip: float32 [..., N], how far from itself a point lands, asked forward and then back;
              pixels; infinite where the answer left the frame, 0 where nobody asked.
  """

  points_xy: Array
  flow_xy: Array
  confidence: Array
  visible: Array
  round_trip: Array


class FramePair(NamedTuple):
  """A batch of frame pairs, with the truth where it is known.

  frames:   float32 [B, 2, H, W, 3], RGB in [0, 1].
  flow_xy:  float32 [B, H, W, 2], pixels, (dx, dy) from frame 1 to frame 2, or None.
  visible:  bool [B, H, W], True where the frame-1 pixel can be seen in frame 2, or None.
  segments: int32 [B, H, W], index of the layer seen at each frame-1 pixel (0: background), or None.
  labels:   `PointLabels` with a leading axis B, or None.
  """

  frames: Array
  flow_xy: Array | None = None
  visible: Array | None = None
  segments: Array | None = None
  labels: PointLabels | None = None


class Prediction(NamedTuple):
  """What a predictor says.

  image:  float32 [B, h, w, 3], the predicted frame 2, ImageNet-normalised; exactly 0 where the mask
          reveals a patch (the release's convention: only hidden patches are predicted).
  tokens: float32 [B, gh, gw, C], the encoder's last normalised output for frame 1, or None.
  """

  image: Array
  tokens: Array | None = None


class FlowEstimate(NamedTuple):
  """What a flow network says.

  flow_xy: float32 [..., H, W, 2], (dx, dy) from frame 1 to frame 2, pixels.
  info:    float32 [..., H, W, 4], the mixture of two Laplacians that the flow is the middle of: the
           logits of the wide and of the narrow one, then the raw logarithms of their scales; or
           None where a network says nothing of it.
  """

  flow_xy: Array
  info: Array | None = None


class Tracks(NamedTuple):
  """Where the points went.

  xy:         float32 [N, T, 2], (x, y) pixels of the video as given, continuous (a pixel's centre
              is index + 0.5).
  visible:    bool [N, T]; False before the query frame.
  confidence: float32 [N, T] in [0, 1].
  """

  xy: Array
  visible: Array
  confidence: Array


class PointFlow(NamedTuple):
  """Where points of frame 1 are in frame 2.

  xy:         float32 [N, 2], (x, y) pixels, continuous: destinations, not displacements.
  visible:    bool [N].
  confidence: float32 [N] in [0, 1].
  """

  xy: Array
  visible: Array
  confidence: Array


class Response(NamedTuple):
  """How strongly the prediction answered a mark.

  heat: float32 [..., h, w], L1 over channels of (marked - clean), averaged over masks, in
        normalised space and at the predictor's resolution.
  peak: float32 [...], mean over masks of each mask's own maximum (the occlusion measure).
  """

  heat: Array
  peak: Array


class Explanation(NamedTuple):
  """Every step of one counterfactual question, at the predictor's resolution (h, w); for pictures.

  mark:        float32 [h, w, 3], what was added to the normalised frame 1.
  marked:      float32 [h, w, 3], the marked frame 1, RGB in [0, 1].
  masks:       bool [M, gh, gw], the masks of frame 2 (True: hidden).
  clean:       float32 [M, h, w, 3], predictions without the mark (revealed patches as they are).
  counterfact: float32 [M, h, w, 3], predictions with the mark.
  responses:   float32 [M, h, w], each mask's L1 response.
  mean:        float32 [h, w], the averaged response that is read out.
  from_xy:     float32 [2], the point asked about, pixels of the frames as given.
  to_xy:       float32 [2], the answer, same pixels.
  visible:     bool [].
  """

  mark: Array
  marked: Array
  masks: Array
  clean: Array
  counterfact: Array
  responses: Array
  mean: Array
  from_xy: Array
  to_xy: Array
  visible: Array


class GaussianParams(NamedTuple):
  """A learned mark: one Gaussian a colour channel (R, G, B), in pixels of the mark's grid.

  mean_yx:     float32 [..., 3, 2], (row, column) of the centre, 0 in the middle of the grid.
  std_yx:      float32 [..., 3, 2], widths along rows and columns, 1 or more.
  correlation: float32 [..., 3], between rows and columns, within (-1, 1).
  amplitude:   float32 [..., 3], the extreme value on the grid, normalised units; may be negative.
  """

  mean_yx: Array
  std_yx: Array
  correlation: Array
  amplitude: Array


class TrainState(NamedTuple):
  """All that a training run needs to go on.

  step:      int32 [], optimizer updates done.
  params:    nested dict of float32 arrays.
  opt_state: optax state.
  ema:       like params, or None when no average is kept.
  """

  step: Array
  params: Any
  opt_state: Any
  ema: Any | None


def first_line(error: Exception) -> str:
  """What an exception says, as far as a sentence of ours holds it; its type where it is mute."""
  return (str(error).strip() or type(error).__name__).splitlines()[0]


class InputError(ValueError):
  """Something the user gave cannot be used; the message is one sentence that says what to do."""


class SaveError(RuntimeError):
  """What was made could not be written; the sentence says why, and what is safe."""

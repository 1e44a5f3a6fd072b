"""Predictors of the public releases, by name: what their converted weights are built as.

Names: opt-cwm-256, opt-cwm-512 (default; Opt-CWM's predictor Psi-RGB, position tables of 256 pixels
resized to 512), cwm-2frame-8x8, cwm-2frame-4x4 (the two-frame CWMs).
Training on from them: python -m cwm_jax.main --config configs/opt_cwm.py:opt-cwm-256
--config.init_from=converted.safetensors --workdir /tmp/on
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from cwm_jax.configs import base

_BASE = dict(encoder_width=768, encoder_depth=12, encoder_heads=12, mlp_ratio=4.0, context=0)
_OPT_CWM = _BASE | dict(
  patch=8,
  mask_ratio=0.9,
  masking="token",
  positions="learned",
  positions_hw=(32, 32),
  decoder_width=768,
  decoder_depth=12,
  decoder_heads=12,
)
_TWO_FRAMES = _BASE | dict(
  image_hw=(224, 224), mask_ratio=0.9, masking="drop", positions="sine", positions_hw=()
)
MODELS = {
  "opt-cwm-256": _OPT_CWM | dict(image_hw=(256, 256)),
  "opt-cwm-512": _OPT_CWM | dict(image_hw=(512, 512)),
  "cwm-2frame-8x8": _TWO_FRAMES
  | dict(patch=8, decoder_width=512, decoder_depth=8, decoder_heads=16),
  "cwm-2frame-4x4": _TWO_FRAMES
  | dict(patch=4, decoder_width=384, decoder_depth=4, decoder_heads=6),
}
# The release's perturber: its MLP's width, the side of its marks in pixels at 256, and how many
# times larger they are drawn for each model.
PERTURBER = dict(hidden_width=512, size=20)
MARK_SCALES = {"opt-cwm-256": 1, "opt-cwm-512": 2}

# The release's Psi-flow: keys of the `flow_predictor` section, and of its `two_stream`.
FLOW_PREDICTOR = dict(kind="two_stream", patch=8, mlp_ratio=4.0)
TWO_STREAM = dict(
  setting="release",
  grid_hw=(28, 28),
  encoder_width=768,
  encoder_heads=12,
  encoder_links=("o<->o", "o-_", "o-_", "o-_") * 3,
  decoder_width=384,
  decoder_heads=6,
  decoder_links=("o<->o", "o<-_", "o-_", "o-_"),
)
# The release's joint training. It means betas of (0.9, 0.95) and never reads them; of what it
# decays, mask tokens are a part.
JOINT_OPTIM = dict(
  peak_lr=1.5e-4,
  scale_lr=True,
  final_lr_ratio=0.0,
  warmup="40 epochs",
  warmup_from_zero=True,
  b1=0.9,
  b2=0.999,
  eps=1e-8,
  weight_decay=0.05,
  decay_exclude=r"bias|scale",
  clip_norm=0.0,
)


def get_config(arg: str = "opt-cwm-512") -> ConfigDict:
  c = base.get_config()
  c.model.update(model(arg or "opt-cwm-512"))
  return c


def model(name: str) -> dict[str, Any]:
  """What a release's predictor has in the `model` section; the rest are the defaults.

  Raises:
    ValueError: an unknown name.
  """
  if name not in MODELS:
    raise ValueError(f"unknown release {name!r}; choose one of {', '.join(MODELS)}")
  return dict(MODELS[name])

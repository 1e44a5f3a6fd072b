"""The flow networks of the public releases, by name, and their sizes.

raft-large-* and raft-small-* (torchvision's names of the training data follow), SEA-RAFT's S, M and
L (M's weights, more iterations), sea-raft-* by the names of its checkpoints, and the network that
Opt-CWM was distilled into, opt-cwm-distilled.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from cwm_jax.configs import base


def sea_raft(
  *,
  depths: tuple[int, int, int],
  iterations: int,
  stem_width: int = 64,
  widths: tuple[int, int, int] = (64, 128, 256),
  dim: int = 128,
  scale: int = 0,
) -> dict[str, Any]:
  """SEA-RAFT's sizes from those that its authors' configurations name.

  Args:
    depths: blocks of each stage, (2, 2, 2) for "resnet18" and (3, 4, 6) for "resnet34".
    iterations: of refinement.
    stem_width: "initial_dim".
    widths: "block_dims".
    dim: channels of the hidden state, and of all else in proportion.
    scale: the network sees frames 2^scale times their size.
  """
  return dict(
    kind="sea_raft",
    stem_width=stem_width,
    widths=widths,
    depths=depths,
    block="residual",
    feature_norm="batch",
    context_norm="batch",
    feature_width=2 * dim,
    hidden_width=dim,
    context_width=dim,
    corr_widths=(2 * dim, dim + dim // 2),
    flow_widths=(dim, dim // 2),
    motion_width=dim,
    head_width=2 * dim,
    radius=4,
    refine_blocks=2,
    iterations=iterations,
    scale=scale,
  )


_RAFT = dict(kind="raft", depths=(2, 2, 2), feature_norm="instance", scale=0)
_LARGE = _RAFT | dict(
  stem_width=64,
  widths=(64, 96, 128),
  block="residual",
  context_norm="batch",
  feature_width=256,
  hidden_width=128,
  context_width=128,
  corr_widths=(256, 192),
  flow_widths=(128, 64),
  motion_width=128,
  head_width=256,
  radius=4,
  gru="separable",
  upsampling="convex",
)
_SMALL = _RAFT | dict(
  stem_width=32,
  widths=(32, 64, 96),
  block="bottleneck",
  context_norm="none",
  feature_width=128,
  hidden_width=96,
  context_width=64,
  corr_widths=(96,),
  flow_widths=(64, 32),
  motion_width=82,
  head_width=128,
  radius=3,
  gru="square",
  upsampling="bilinear",
)
_DEPTHS = {"S": (2, 2, 2), "M": (3, 4, 6), "L": (3, 4, 6)}
# Trained on: C(hairs), T(hings), Sintel with KITTI and HD1K and Things (SKHT), then K(ITTI) alone.
# V1 are the original authors' weights, V2 torchvision's own.
LARGE = tuple(f"C_T{more}_V{version}" for more in ("", "_SKHT", "_SKHT_K") for version in (1, 2))
SMALL = ("C_T_V1", "C_T_V2")
_STAGES = ("", "-C", "-C-T", "-C-T-TSKH", "-C-T-TSKH-kitti", "-C-T-TSKH-spring")
_SIZES = ("480x640", "368x496", "432x960", "432x960", "432x960", "540x960")
SEA_RAFT = tuple(f"Tartan{stage}{size}" for stage, size in zip(_STAGES, _SIZES))
# As in the published evaluations: on KITTI 24 iterations and rows added at the bottom only, 32
# and split elsewhere; SEA-RAFT's on Spring sees frames at half their size.
_KITTI = dict(iterations=24, padding="bottom")
NETWORKS = {
  **{f"raft-large-{n}": _LARGE | (_KITTI if "_K_" in n else dict(iterations=32)) for n in LARGE},
  **{f"raft-small-{n}": _SMALL | dict(iterations=32) for n in SMALL},
  "sea-raft-S": sea_raft(depths=_DEPTHS["S"], iterations=4),
  "sea-raft-M": sea_raft(depths=_DEPTHS["M"], iterations=4),
  "sea-raft-L": sea_raft(depths=_DEPTHS["L"], iterations=12),
  **{
    f"sea-raft-{checkpoint}-{size}": sea_raft(
      depths=_DEPTHS[size], iterations=4, scale=-1 if "spring" in checkpoint else 0
    )
    for checkpoint in SEA_RAFT
    for size in ("S", "M")
  },
  "opt-cwm-distilled": sea_raft(depths=_DEPTHS["M"], iterations=12),
}


def get_config(arg: str = "sea-raft-S") -> ConfigDict:
  c = base.get_config()
  c.flow_network.update(network(arg or "sea-raft-S"))
  return c


def network(name: str) -> dict[str, Any]:
  """What a network has in the `flow_network` section; the rest are the defaults.

  Raises:
    ValueError: an unknown name.
  """
  if name not in NETWORKS:
    raise ValueError(f"unknown flow network {name!r}; choose one of {', '.join(NETWORKS)}")
  return dict(NETWORKS[name])

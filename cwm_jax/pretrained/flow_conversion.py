"""Released RAFT and SEA-RAFT checkpoints to parameters and config of ours, and back.

Sizes are read off the shapes, so a network of any size in one of the known namings is taken; what
shapes do not tell, the number of iterations and the scale, comes from the release.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any

import numpy as np

from cwm_jax.pretrained import flow_keymaps, keymaps, weights
from cwm_jax.pretrained.flow_networks import SECTION
from cwm_jax.pretrained.merge import agreeing_release
from cwm_jax.types import InputError

_LEVELS = 4  # of the correlation pyramid; all releases have as many
# How often a network of a naming improves its flow, where no release says it.
_ITERATIONS = {"raft": 12, "torchvision": 12, "sea_raft": 4}


def from_state(
  state: Mapping[str, np.ndarray], naming: str, *, release: str | None, where: str
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, int]]:
  """Our parameters and config from a release's tensors.

  Args:
    state: name -> array of any float type, and counters.
    naming: of `flow_keymaps.NAMINGS`.
    release: a name of `configs/flow_networks.py`; None takes the first whose sizes agree, or none.
    where: names the state's origin in messages.

  Returns:
    What a `convert.Converted` begins with: params, config, extra, skipped.

  Raises:
    InputError: keys that no rule names or rules without keys (both are listed), or tensors that do
      not fit the model.
  """
  counters = sum(name.endswith(flow_keymaps.COUNTERS) for name in state)
  whole = flow_keymaps.merge_twins(state, where=where)
  rules = flow_keymaps.rules_of_state(whole, naming)
  shapes = keymaps.to_shapes({n: a.shape for n, a in whole.items()}, rules, where=where)
  config = _config(shapes, naming, release=release, where=where)
  _, expected = weights.expected_shapes(config, where=where)
  weights.check_names(shapes, expected, where=where)
  params = keymaps.to_params(whole, rules, where=where)
  skipped = {flow_keymaps.COUNTERS: counters} if counters else {}
  return params, config, {"naming": {SECTION: naming}}, skipped


def to_state(params: dict[str, Any], naming: str, *, where: str) -> dict[str, np.ndarray]:
  """A release's state dict from our parameters; `from_state` backwards, without its counters.

  Args:
    naming: of `flow_keymaps.NAMINGS`.
    where: names the parameters' origin in messages.

  Raises:
    InputError: an unknown naming, or parameters that it has no place for.
  """
  if naming not in flow_keymaps.NAMINGS:
    raise InputError(f"{where}: no release of a flow network has the naming {naming!r}")
  rules = flow_keymaps.rules_of_params(weights.flatten(params), naming)
  state = keymaps.to_state(params, rules, where=where)
  return flow_keymaps.add_twins(state, naming)


def _config(
  shapes: Mapping[str, tuple[int, ...]], naming: str, *, release: str | None, where: str
) -> dict[str, Any]:
  """A job config whose flow network has these shapes."""
  from cwm_jax.configs import base, flow_networks

  told = _told_by_shapes(shapes, naming, where)
  if release is not None and release not in flow_networks.NETWORKS:
    choices = ", ".join(flow_networks.NETWORKS)
    raise InputError(f"{where} is a flow network, and {release!r} is none; choose one of {choices}")
  sizes = agreeing_release(told, flow_networks.NETWORKS, release, where=where)
  if sizes is None:
    sizes = told | {"iterations": _ITERATIONS[naming]}
  job = base.get_config()
  job.flow_network.update(sizes)
  return job.to_dict()


def _told_by_shapes(
  shapes: Mapping[str, tuple[int, ...]], naming: str, where: str
) -> dict[str, Any]:
  """The keys of a `flow_network` section that a network's shapes fix."""
  encoder, context = "feature_encoder", "context_encoder"
  stages = [f"{encoder}/stage{stage}_block" for stage in (1, 2, 3)]
  depths = tuple(sum(n.startswith(s) and n.endswith("/conv1/bias") for n in shapes) for s in stages)
  first = f"{stages[0]}0"
  bottleneck = f"{first}/conv3/bias" in shapes
  last = "conv3" if bottleneck else "conv2"
  try:
    hidden = shapes["flow_head/conv1/kernel"][2]
    windows, remainder = divmod(shapes["motion_encoder/corr1/kernel"][2], _LEVELS)
    corr_widths = [
      shapes[name][0]
      for name in ("motion_encoder/corr1/bias", "motion_encoder/corr2/bias")
      if name in shapes
    ]
    told = {
      "kind": "sea_raft" if naming == "sea_raft" else "raft",
      "stem_width": shapes[f"{encoder}/stem/bias"][0],
      "widths": tuple(shapes[f"{stage}0/{last}/bias"][0] for stage in stages),
      "depths": depths,
      "block": "bottleneck" if bottleneck else "residual",
      "feature_norm": _norm(shapes, encoder, "instance"),
      # Of the two norms without numbers, the small network's context has none.
      "context_norm": _norm(shapes, context, "none" if bottleneck else "instance"),
      "feature_width": shapes[f"{encoder}/out/bias"][0],
      "hidden_width": hidden,
      "context_width": shapes[f"{context}/out/bias"][0] - hidden,
      "corr_widths": tuple(corr_widths),
      "flow_widths": tuple(shapes[f"motion_encoder/flow{i}/bias"][0] for i in (1, 2)),
      "motion_width": shapes["motion_encoder/both/bias"][0] + 2,
      "head_width": shapes["flow_head/conv1/bias"][0],
      "radius": (isqrt(windows) - 1) // 2,
    }
    if naming == "sea_raft":
      told["refine_blocks"] = sum(name.endswith("/gamma") for name in shapes)
    else:
      told["gru"] = "separable" if "update/gates2/bias" in shapes else "square"
      told["upsampling"] = "convex" if "upsample_head/conv1/bias" in shapes else "bilinear"
  except (KeyError, IndexError) as error:
    raise InputError(f"{where} is a flow network, but has nothing that makes {error}") from None
  if remainder or (2 * told["radius"] + 1) ** 2 != windows:
    raise InputError(f"{where}: its correlations are not {_LEVELS} levels of square windows")
  return told


def _norm(shapes: Mapping[str, tuple[int, ...]], encoder: str, without_numbers: str) -> str:
  return "batch" if f"{encoder}/stem_norm/batch/scale" in shapes else without_numbers

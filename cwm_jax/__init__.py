"""Motion read out of world models: counterfactual world models in JAX and Flax.

The public names below are imported when they are first used, so that `import cwm_jax` is quick.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
  "Explanation": "cwm_jax.types",
  "FramePair": "cwm_jax.types",
  "InputError": "cwm_jax.types",
  "PointFlow": "cwm_jax.types",
  "Prediction": "cwm_jax.types",
  "Tracker": "cwm_jax.tracker",
  "Tracks": "cwm_jax.types",
  "build_model": "cwm_jax.models:build",
  "iter_frames": "cwm_jax.data.video",
  "load_weights": "cwm_jax.pretrained.weights:load",
  "save_weights": "cwm_jax.pretrained.weights:save",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
  if name == "__version__":
    from importlib.metadata import version

    return version("cwm-jax")
  if name not in _HOMES:
    raise AttributeError(f"module 'cwm_jax' has no attribute {name!r}")
  module, _, attribute = _HOMES[name].partition(":")
  value = getattr(importlib.import_module(module), attribute or name)
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  return sorted([*globals(), *_HOMES, "__version__"])

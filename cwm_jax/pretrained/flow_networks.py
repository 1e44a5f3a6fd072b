"""Flow networks in weights files: the config's `flow_network` section says which, and its sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cwm_jax.pretrained import sections

SECTION = "flow_network"


def is_flow_network(config: Mapping[str, Any]) -> bool:
  """Whether a weights file's config describes a flow network; otherwise it is a predictor."""
  return sections.kind_of(config, SECTION) not in (None, "none")


def expected(config: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
  """The module that the config describes, and its parameters, nested, as shapes.

  Raises:
    KeyError, ValueError, TypeError: the section lacks a key or holds a value that cannot be built.
  """
  import jax

  from cwm_jax import models

  module = models.build_flow_network(config[SECTION])
  # Parameters do not depend on the frames' size.
  frames = jax.ShapeDtypeStruct((1, 2, 64, 64, 3), "float32")
  return module, jax.eval_shape(module.init, jax.random.key(0), frames)["params"]

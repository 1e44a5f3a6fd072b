"""Networks. `build` and `build_flow_predictor` are the ways from a config to a module."""

from __future__ import annotations

from typing import Any


def build(model: Any):
  """Makes the predictor that `config.model` describes.

  Args:
    model: mapping with the keys of `configs/base.py`'s `model` section.

  Raises:
    ValueError: a size or dtype that cannot be built.
  """
  from cwm_jax.models.predictor import Predictor

  h, w = model["image_hw"]
  keys = (
    "patch masking positions encoder_width encoder_depth encoder_heads decoder_width decoder_depth "
    "decoder_heads mlp_ratio context attention_impl remat"
  ).split()
  named = {key: model[key] for key in keys}
  named["attention_impl"] = named["attention_impl"] or None
  grid_hw = (h // model["patch"], w // model["patch"])
  # Weights files with rotary positions need not name a grid.
  if (model["positions"] != "rotary" or "positions_hw" in model) and model["positions_hw"]:
    grid_hw = tuple(model["positions_hw"])
  if model["attention_dtype"]:
    named["attention_dtype"] = _dtype(model, "model", "attention_dtype")
  return Predictor(grid_hw=grid_hw, dtype=_dtype(model, "model"), **named)


def in_dtype(model: Any, dtype: str | None, attention_dtype: str | None = None) -> dict[str, Any]:
  """`model` that computes in `dtype`; its attention stays as it was unless it is named as well.

  Args:
    model: as in `build`.
    dtype: None keeps what `model` says.
    attention_dtype: None keeps the dtype in which `model`'s attention has computed so far.
  """
  before = model["attention_dtype"] or model["dtype"]
  named = dict(dtype=dtype or model["dtype"], attention_dtype=attention_dtype or before)
  return {**model, **named}


def build_flow_predictor(flow_predictor: Any, model: Any = None):
  """Makes the flow-conditioned predictor that `config.flow_predictor` describes.

  Args:
    flow_predictor: mapping with the keys of `configs/base.py`'s `flow_predictor` section.
    model: as in `build`; the predictor as which kind "moved" begins.

  Raises:
    ValueError: an unknown kind or dtype, or a predictor as which it cannot begin.
  """
  from cwm_jax.models.flow_predictor import FlowConditionedPredictor, SingleStreamFlowPredictor

  kinds = {"single": SingleStreamFlowPredictor, "two_stream": FlowConditionedPredictor}
  kind = flow_predictor["kind"]
  if kind == "moved":
    return _build_moved(flow_predictor, model)
  if kind not in kinds:
    raise ValueError(
      f"flow_predictor.kind is {kind!r}; choose one of {', '.join((*kinds, 'moved'))}"
    )
  shared = {key: flow_predictor[key] for key in ("patch", "mlp_ratio", "remat")}
  sizes = dict(flow_predictor[kind])
  if kind == "two_stream":
    sizes["grid_hw"] = tuple(sizes["grid_hw"]) or None
    sizes |= {key: tuple(sizes[key]) for key in ("encoder_links", "decoder_links")}
  return kinds[kind](
    **shared,
    **sizes,
    attention_impl=flow_predictor["attention_impl"] or None,
    dtype=_dtype(flow_predictor, "flow_predictor"),
  )


def build_flow_network(flow_network: Any):
  """Makes the RAFT or SEA-RAFT that `config.flow_network` describes.

  Args:
    flow_network: mapping with the keys of `configs/base.py`'s `flow_network` section.

  Raises:
    ValueError: an unknown kind or dtype.
  """
  from cwm_jax.models.raft import Raft
  from cwm_jax.models.sea_raft import SeaRaft

  kinds = {"raft": (Raft, ("gru", "upsampling")), "sea_raft": (SeaRaft, ("refine_blocks",))}
  kind = flow_network["kind"]
  if kind not in kinds:
    raise ValueError(f"flow_network.kind is {kind!r}; choose one of {', '.join(kinds)}")
  module, own = kinds[kind]
  tuples = "widths depths corr_widths flow_widths image_hw".split()
  keys = (
    "stem_width block feature_norm context_norm feature_width hidden_width context_width "
    "motion_width head_width radius levels iterations correlation padding scale remat"
  ).split()
  return module(
    **{key: tuple(flow_network[key]) for key in tuples},
    **{key: flow_network[key] for key in (*keys, *own)},
    dtype=_dtype(flow_network, "flow_network"),
  )


def _build_moved(flow_predictor: Any, model: Any):
  from cwm_jax.models.moved_patches import MovedPatchesFlowPredictor

  if model is None:
    raise ValueError("flow_predictor.kind 'moved' begins as a predictor, and there is none here")
  if model["positions"] != "rotary" or model["masking"] != "drop":
    raise ValueError(
      "flow_predictor.kind 'moved' begins as a predictor with positions='rotary' and "
      f"masking='drop', not {model['positions']!r} and {model['masking']!r}"
    )
  predictor = build(model).clone(
    remat=flow_predictor["remat"],
    attention_impl=flow_predictor["attention_impl"] or None,
    dtype=_dtype(flow_predictor, "flow_predictor"),
  )
  return MovedPatchesFlowPredictor(predictor)


def _dtype(section: Any, name: str, key: str = "dtype"):
  import jax.numpy as jnp

  dtypes = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
  if section[key] not in dtypes:
    raise ValueError(f"{name}.{key} is {section[key]!r}; choose one of {', '.join(dtypes)}")
  return dtypes[section[key]]

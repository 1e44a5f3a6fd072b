"""Reading stored reference values: layouts, settings, weights, tolerances."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cwm_jax import models
from cwm_jax.configs import base
from cwm_jax.pretrained import keymaps


def arrays(folder: Path, name: str) -> dict[str, np.ndarray]:
  """Every array of `name`.npz."""
  with np.load(folder / f"{name}.npz") as file:
    return dict(file)


def state(folder: Path, name: str) -> dict[str, np.ndarray]:
  """The PyTorch state dict of `name`_state.safetensors."""
  from safetensors.numpy import load_file

  return load_file(folder / f"{name}_state.safetensors")


def settings(folder: Path, *path: str) -> Any:
  """A section of config.json; None where the set has none there."""
  section = json.loads((folder / "config.json").read_text())
  for key in path:
    section = section.get(key) if isinstance(section, dict) else None
  return section


def tolerance(folder: Path, case: str, what: str, stored: np.ndarray, relative=1e-4) -> float:
  """Ten times the set's noise floor where it states one, else `relative` to the largest value."""
  floor = settings(folder, "noise", case, what)
  return 10 * floor if floor else relative * float(np.abs(stored).max())


def frames(video: np.ndarray) -> jax.Array:
  """[B, C, T, H, W] to [B, T, H, W, C]."""
  return jnp.asarray(video.transpose(0, 2, 3, 4, 1))


def masks(flags: np.ndarray, grid_hw: tuple[int, int]) -> jax.Array:
  """[B, 2 gh gw] to [B, 2, gh, gw]."""
  return jnp.asarray(flags.reshape(len(flags), 2, *grid_hw))


def stride(total: int, kept: int) -> int:
  """The step at which `kept` of `total` items were stored."""
  step = -(-total // kept)
  assert -(-total // step) == kept
  return step


def predictor(section: dict[str, Any], *, scale: int = 1, patch: int = 8) -> Any:
  """The module that a section of config.json describes, for images `scale` times its size."""
  patch = section.get("patch_size", patch)
  side = section["img_size"]
  return models.build(
    dict(
      image_hw=(side * scale, side * scale),
      patch=patch,
      masking="token",
      positions="learned",
      positions_hw=(side // patch, side // patch),
      encoder_width=section["encoder_embed_dim"],
      encoder_depth=section["encoder_depth"],
      encoder_heads=section["encoder_num_heads"],
      decoder_width=section["decoder_embed_dim"],
      decoder_depth=section["decoder_depth"],
      decoder_heads=section["decoder_num_heads"],
      mlp_ratio=4.0,
      context=0,
      dtype="float32",
      attention_impl="",
      attention_dtype="",
      remat="none",
    )
  )


def flow_predictor(folder: Path) -> Any:
  """The two-stream module that the set's own JSON file describes."""
  name = settings(folder, "opt_cwm", "two_stream_config")
  told = json.loads((folder / name).read_text())
  encoder, decoder = told["encoder_params"], told["decoder_params"]
  blocks = encoder["transformer_params"]["block_params"]["primary"]
  patch = encoder["primary"]["patch_size"][-1]
  section = base.get_config().flow_predictor.to_dict()
  section |= dict(kind="two_stream", patch=patch, mlp_ratio=blocks.get("mlp_ratio", 4.0))
  section["two_stream"] = dict(
    setting="release",
    grid_hw=[side // patch for side in encoder["primary"]["inp"]["inp_size"][1:]],
    encoder_width=blocks["dim"],
    encoder_heads=blocks["attn"]["num_heads"],
    encoder_links=_links(encoder["transformer_params"]),
    decoder_width=decoder["block_params"]["primary"]["dim"],
    decoder_heads=decoder["block_params"]["primary"]["attn"]["num_heads"],
    decoder_links=_links(decoder),
  )
  return models.build_flow_predictor(section)


def _links(section: dict[str, Any]) -> tuple[str, ...]:
  patterns = section["conn_patterns"]
  return (patterns,) * section["depth"] if isinstance(patterns, str) else tuple(patterns)


def predictor_params(state: dict[str, np.ndarray], prefix: str = "") -> dict[str, Any]:
  """A predictor's parameters out of a state dict, which may hold more under other prefixes."""
  mine = {name: array for name, array in state.items() if name.startswith(prefix)}
  return keymaps.to_params(mine, keymaps.predictor_rules(prefix=prefix))


def recipe(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
  """The random weights that the set fills full-size models with; its INDEX states the recipe."""
  made = {}
  for name, shape in shapes.items():
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    values, leaf = rng.standard_normal(shape), name.rsplit(".", 1)[-1]
    if leaf == "running_mean":
      values *= 0.1
    elif leaf == "running_var":
      values = np.exp(0.3 * values)
    elif leaf == "pos_embed" or "mask_token" in leaf:
      values *= 0.5
    elif leaf == "gamma":
      values *= 0.3
    elif leaf.endswith("bias"):
      values *= 0.1
    elif len(shape) == 1:
      values = 1 + 0.2 * values
    else:
      values /= np.sqrt(np.prod(shape[1:]))
    made[name] = values.astype(np.float32)
  return made

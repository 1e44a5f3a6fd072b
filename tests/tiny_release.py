"""A released predictor and a joint training's state, tiny, as PyTorch names their tensors."""

from __future__ import annotations

import numpy as np

from cwm_jax.configs import base as defaults
from cwm_jax.pretrained import flow_predictors, keymaps, two_stream_keys, weights

HEADS = (2, 4)  # of the predictor's encoder and decoder
PSI_FLOW = "recon_cwm_model.two_stream_vmae."
_RNG = np.random.default_rng(0)


def _linear(name, out, into):
  return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def _norm(name, width):
  return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _half(name, width, depth):
  shapes = _norm(f"{name}.norm", width)
  for i in range(depth):
    block = f"{name}.blocks.{i}"
    shapes |= _norm(f"{block}.norm1", width) | _norm(f"{block}.norm2", width)
    shapes |= {f"{block}.attn.{kind}_bias": (width,) for kind in "qkv"}
    shapes |= {f"{block}.attn.qkv.weight": (3 * width, width)}
    shapes |= _linear(f"{block}.attn.proj", width, width)
    shapes |= _linear(f"{block}.mlp.fc1", 4 * width, width)
    shapes |= _linear(f"{block}.mlp.fc2", width, 4 * width)
  return shapes


def base_shapes(side=2, patch=4, encoder=8, decoder=12):
  """A released base predictor, tiny: 2 + 1 blocks."""
  count = 2 * side * side
  return {
    "mask_token": (1, 1, encoder),
    "pos_embed": (1, count, decoder),
    "encoder.pos_embed": (1, count, encoder),
    "encoder.patch_embed.proj.weight": (encoder, 3, 1, patch, patch),
    "encoder.patch_embed.proj.bias": (encoder,),
    **_half("encoder", encoder, 2),
    **_linear("encoder_to_decoder", decoder, encoder),
    **_half("decoder", decoder, 1),
    **_linear("decoder.head", 3 * patch * patch, decoder),
  }


def _perturber_shapes(width=8, hidden=6):
  shapes = {}
  for at, out, into in ((0, hidden, width), (3, hidden, hidden), (6, 18, hidden)):
    shapes |= _linear(f"nn.mlp.{at}", out, into) | _norm(f"nn.mlp.{at + 1}", out)
  return shapes


def random(shapes, prefix=""):
  """A state of these shapes."""
  return {prefix + n: _RNG.normal(size=s).astype(np.float32) for n, s in shapes.items()}


def joint(base=True):
  """What joint training saves: a flow predictor, and Psi-flow beside it."""
  state = random(_perturber_shapes(), "flow_predictor.perturber.") | _psi_flow()
  return state | (random(base_shapes(), "flow_predictor.cwm_model.") if base else {})


def _psi_flow(width=8, decoder=12):
  """A released Psi-flow, tiny: 3 + 2 blocks."""
  links = ("o<->o", "o-_", "o-_"), ("o<-_", "o-_")
  sizes = dict(encoder_width=width, encoder_heads=2, decoder_width=decoder, decoder_heads=4)
  section = defaults.get_config().flow_predictor
  section.update(kind="two_stream", patch=4)
  section.two_stream.update(encoder_links=links[0], decoder_links=links[1], **sizes)
  shapes = flow_predictors.expected_shapes({"flow_predictor": section.to_dict()}, where="here")
  params = {n: _RNG.normal(size=x.shape) for n, x in weights.flatten(shapes).items()}
  rules = two_stream_keys.two_stream_rules(*links, prefix=PSI_FLOW)
  return keymaps.to_state(weights.unflatten(params), rules)

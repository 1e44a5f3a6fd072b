"""Attention in loops over pairs and heads: of several devices each has its own, and sends none."""

from __future__ import annotations

import tiny_job

# Four pairs over data x fsdp, four heads over tensor: what a device holds is what it works on.
SCRIPT = """
import re
import jax
import jax.numpy as jnp
import numpy as np
from cwm_jax import sharding
from cwm_jax.models import layers, split
from jax.sharding import NamedSharding, PartitionSpec

assert jax.device_count() == 8
mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
place = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor", None))
q, k, v, weight = jax.random.normal(jax.random.key(0), (4, 4, 64, 4, 8))

def loss(q, k, v, weight):
  return jnp.sum(layers.attend(q, k, v, "cached") * weight)

gradient = jax.value_and_grad(loss, argnums=(0, 1, 2))

def placed(*arrays):
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    assert split.known()
    return gradient(*arrays)

assert not split.known()
one, one_grads = jax.jit(gradient)(q, k, v, weight)
apart = [jax.device_put(x, place) for x in (q, k, v, weight)]
compiled = jax.jit(placed).lower(*apart).compile()
many, many_grads = compiled(*apart)
# A sum of 8,192 products of either sign: its error does not shrink with it.
np.testing.assert_allclose(many, one, rtol=0, atol=1e-3)
for mine, theirs in zip(many_grads, one_grads):
  np.testing.assert_allclose(mine, theirs, atol=1e-5)
  assert mine.sharding.is_equivalent_to(place, 4)
kinds = r" (all-[a-z-]+|collective-permute|reduce-scatter)(?:-start)?\\("
sent = re.findall(kinds, compiled.as_text())
assert set(sent) == {"all-reduce"}, sent  # the loss alone
# Heads or pairs that do not divide are everybody's.
odd = [x[:3, :, :3] for x in (q, k, v, weight)]
everywhere = jax.device_put(odd, sharding.replicated(mesh))
many, one = jax.jit(placed)(*everywhere)[0], jax.jit(gradient)(*odd)[0]
np.testing.assert_allclose(many, one, rtol=0, atol=1e-3)
print("ALIKE")
"""


def test_devices_loop_over_their_own_pairs_and_heads_and_find_what_one_device_finds():
  devices = f"--xla_force_host_platform_device_count=8 {tiny_job.QUICK}"
  done = tiny_job.run_script(SCRIPT, XLA_FLAGS=devices)
  assert done.returncode == 0, done.stderr[-2000:]
  assert "ALIKE" in done.stdout

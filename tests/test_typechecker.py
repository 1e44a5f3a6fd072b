"""Annotations are checked while tests run; without this one they could stop being so unseen."""

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from cwm_jax import geometry, viz


def test_arrays_of_another_shape_or_type_than_annotated_are_refused():
  geometry.resize(jnp.zeros((4, 6, 3)), (2, 3))
  with pytest.raises(TypeCheckError):
    geometry.resize(jnp.zeros((4, 6)), (2, 3))
  with pytest.raises(TypeCheckError):
    geometry.resize(jnp.zeros((4, 6, 3), jnp.int32), (2, 3))
  with pytest.raises(TypeCheckError):  # as many points as there are flags
    viz.draw_points(np.zeros((9, 9, 3), np.uint8), np.zeros((2, 2)), visible=np.ones(3, bool))

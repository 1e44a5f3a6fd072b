"""`cwm-jax view`: one local page on which to click a point and see how the answer comes about."""

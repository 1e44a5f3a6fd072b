"""Tables of the public releases that this project reads; in the wheel as `cwm_jax.third_party`."""

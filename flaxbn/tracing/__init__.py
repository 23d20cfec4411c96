"""Programs of jax, traced and interpreted: statistics chosen from outside. Nothing here knows Flax."""

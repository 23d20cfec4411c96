"""A Flax model, seen from outside: which layers it runs, and which of its statistics they read."""

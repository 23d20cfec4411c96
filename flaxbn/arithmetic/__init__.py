"""Pure functions on arrays: moments, normalization, renormalization."""

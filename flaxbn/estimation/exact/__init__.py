"""Statistics of the whole set as one batch."""

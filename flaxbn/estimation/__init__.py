"""Statistics of whole models, from data."""

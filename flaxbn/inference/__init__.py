"""Models as files that predict."""

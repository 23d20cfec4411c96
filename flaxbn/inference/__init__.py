"""Models as files that predict: what may be written (export), in what form (artifact), and how it is read (load)."""

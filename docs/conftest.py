"""The documentation's examples run on eight simulated devices, and what several blocks compile is compiled once."""

import tempfile

import jax

collect_ignore_glob = ["*.py"]  # what mkdocs is told: it runs where mkdocs is installed
_compiled = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", _compiled.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

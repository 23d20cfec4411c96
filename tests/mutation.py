"""Breaks the package on purpose, one place at a time; each must fail a test within the file of its own module.

`make mutation` runs it on a copy of the package; `make mutation ARGS=ema` runs those whose name or module holds "ema".
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]


class Mutation(NamedTuple):
    """One place that is broken: `old` is replaced by `new` in `module`, which `tests` are to find out."""

    name: str
    module: str
    old: str
    new: str
    tests: str


MOMENTS, MEASURE, PIVOT = "arithmetic/moments.py", "arithmetic/measure.py", "arithmetic/pivot.py"
RENORM, NORMALIZE = "arithmetic/renorm.py", "arithmetic/normalize.py"
PRIMITIVE, PROGRAM = "tracing/primitive.py", "tracing/program.py"
TEST_MOMENTS, TEST_RENORM = "arithmetic/test_moments.py", "arithmetic/test_renorm.py"
TEST_PRIMITIVE, TEST_PROGRAM = "tracing/test_primitive.py", "tracing/test_program.py"

MUTATIONS = [
    Mutation(
        "merge: no variance between means",
        MOMENTS,
        "moments.count * (moments.var + abs2(deviation))",
        "moments.count * (moments.var + 0 * abs2(deviation))",
        TEST_MOMENTS,
    ),
    Mutation(
        "merge: on the host in float32",
        MOMENTS,
        "return np.result_type(field, np.float64)",
        "return np.result_type(field, np.float32)",
        TEST_MOMENTS,
    ),
    Mutation(
        "variance: the mean of deviations stays in it",
        PIVOT,
        "second / divisor - abs2(mean)",
        "second / divisor",
        TEST_MOMENTS,
    ),
    Mutation("variance: not clipped at 0", PIVOT, "jnp.minimum(var, 0)", "0 * var", TEST_MOMENTS),
    Mutation(
        "weights: hidden values are seen",
        MEASURE,
        "x if weights is None else jnp.where(weights > 0, x, 0)",
        "x",
        TEST_MOMENTS,
    ),
    Mutation(
        "weights: negative ones count",
        MEASURE,
        "jnp.where(weights > 0, weights, 0).astype(real)",
        "weights.astype(real)",
        TEST_MOMENTS,
    ),
    Mutation(
        "one value: it counts as several",
        MEASURE,
        "return self.largest < self.deviations.count",
        "return self.deviations.count > 0",
        "layers/test_unusable_batches.py",
    ),
    Mutation(
        "overflow: what is infinite is used",
        "layers/core.py",
        "enough & ~measured.overflow",
        "enough",
        "layers/test_unusable_batches.py",
    ),
    Mutation(
        "one value: estimates do not mind",
        "estimation/precise.py",
        "check_several(found, asked.layers)",
        "pass",
        "estimation/test_single_values.py",
    ),
    Mutation(
        "ramp: one that has begun is closed",
        "diagnostics/renorm_layers.py",
        "self.r_max <= 1 and self.d_max <= 0",
        "self.is_scheduled",
        "diagnostics/test_renormalization.py",
    ),
    Mutation(
        "ghost: no variance between groups",
        MOMENTS,
        "deviations.count * (deviations.var + abs2(mean))",
        "deviations.count * deviations.var",
        "layers/test_ghost.py",
    ),
    Mutation(
        "ghost: members keep averages of their own",
        "layers/ghost.py",
        '"axis_name": options.axis_name',
        '"axis_name": None',
        "layers/test_ghost.py",
    ),
    Mutation(
        "debiased: not from the first value on",
        "arithmetic/averages.py",
        "jnp.expm1((steps + 1) * rate)",
        "jnp.expm1((steps + 2) * rate)",
        "arithmetic/test_averages.py",
    ),
    Mutation(
        "steps: domains count together",
        "layers/running_average.py",
        "jnp.any(usable, tuple(channels))",
        "jnp.any(usable)",
        "layers/test_averages.py",
    ),
    Mutation("pivot: 0 whatever the values", MEASURE, "if not fast:", "if False:", "arithmetic/test_measure.py"),
    Mutation(
        "psum: each member counts its own values only",
        MEASURE,
        "found = jax.lax.psum(found, axis_name, axis_index_groups=axis_index_groups)",
        "found = found[0], *jax.lax.psum(found[1:], axis_name, axis_index_groups=axis_index_groups)",
        "layers/test_sync.py",
    ),
    Mutation(
        "renorm: r not bounded below",
        RENORM,
        "sigma_batch / sigma, 1 / r_max, r_max)",
        "sigma_batch / sigma, 0, r_max)",
        TEST_RENORM,
    ),
    Mutation(
        "renorm: d not bounded below",
        RENORM,
        "running.mean) / sigma, -d_max, d_max)",
        "running.mean) / sigma, -jnp.inf, d_max)",
        TEST_RENORM,
    ),
    Mutation(
        "renorm: statistics after the update",
        "layers/core.py",
        "_Statistics(running.mean - selected.pivot, running.var)",
        "_Statistics(running.mean - selected.pivot, 0.99 * running.var + 0.01 * selected.var)",
        "layers/test_renorm.py",
    ),
    Mutation(
        "ema: weights swapped",
        NORMALIZE,
        "return momentum * old + (1 - momentum) * new",
        "return momentum * new + (1 - momentum) * old",
        "arithmetic/test_normalize.py",
    ),
    Mutation(
        "normalize: no residual",
        NORMALIZE,
        "rest = mean - pivot if residual is None else residual",
        "rest = mean - pivot",
        "arithmetic/test_normalize.py",
    ),
    Mutation(
        "vmap: own lanes are not counted as channels",
        PRIMITIVE,
        'params = params | {"axes": _moved(params["axes"])}',
        "pass",
        TEST_PRIMITIVE,
    ),
    Mutation(
        "vmap: shared lanes are not reduced",
        PRIMITIVE,
        '{"axes": (0, *_moved(params["axes"]))}',
        '{"axes": _moved(params["axes"])}',
        TEST_PRIMITIVE,
    ),
    Mutation(
        "cond: all branches have the numbers of the first",
        PROGRAM,
        "[site + sum(len(p.layer_names()) for p in programs[:i]) for i in range(len(programs))]",
        "[site for _ in programs]",
        TEST_PROGRAM,
    ),
    Mutation("scan: always forwards", PROGRAM, "length=length, reverse=reverse", "length=length", TEST_PROGRAM),
    Mutation(
        "entries: computed numbers are taken for read ones",
        "models/entries.py",
        "if np.all(again - total == entries) else None",
        "",
        "models/test_entries.py",
    ),
    Mutation(
        "entries: one numbering twice",
        "models/entries.py",
        "zip(seen(0), seen(total))",
        "((m, m if m is UNKNOWN else m + total) for m in seen(0))",
        "models/test_entries.py",
    ),
    Mutation(
        "known: what a lifted method hands through is lost",
        "tracing/known.py",
        "or (can_be_opened(eqn) and 0 < unknown < len(values))",
        "",
        "models/test_lifted.py",
    ),
    Mutation(
        "batches: a buffer that is filled again is kept",
        "data/batches.py",
        "leaf if isinstance(leaf, jax.Array) else np.array(leaf)",
        "leaf",
        "data/test_batches.py",
    ),
    Mutation(
        "batches: in order instead of strided",
        "data/batches.py",
        "np.arange(k, samples, count, dtype=np.int32)",
        "np.array_split(np.arange(samples, dtype=np.int32), count)[k]",
        "data/test_batches.py",
    ),
    Mutation(
        "batches: the smaller ones are left out",
        "data/batches.py",
        "(rows[:larger], rows[larger:])",
        "(rows[:larger] or rows,)",
        "data/test_batches.py",
    ),
    Mutation(
        "batches: the last one of a stream is not cut",
        "data/batches.py",
        "min(count_samples(batch), self.num_samples - seen)",
        "count_samples(batch)",
        "data/test_batches.py",
    ),
]


def is_found(mutation: Mutation, copy: pathlib.Path) -> bool:
    """Whether a test fails where the copy of the package is broken; an error if the text is not there, once."""
    path = copy / "flaxbn" / mutation.module
    source = path.read_text()
    if source.count(mutation.old) != 1:
        raise ValueError(
            f"{mutation.name}: {mutation.module} holds {source.count(mutation.old)} times {mutation.old!r}."
        )
    path.write_text(source.replace(mutation.old, mutation.new))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/{mutation.tests}"]
    ended = subprocess.run(
        command, cwd=copy, env=os.environ | {"PYTHONPATH": str(copy)}, capture_output=True, text=True
    )
    path.write_text(source)
    if ended.returncode not in (0, 1):
        raise RuntimeError(
            f"{mutation.name}: pytest did not run its tests:\n{ended.stdout[-2000:]}{ended.stderr[-2000:]}"
        )
    return ended.returncode == 1


def main(word: str = "") -> int:
    """1 if a mutation is not found by the tests of its module."""
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder)
        for name in ("flaxbn", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        for mutation in MUTATIONS:
            if word in mutation.name or word in mutation.module:
                found = is_found(mutation, copy)
                missed += [] if found else [mutation.name]
                print(f"{'found ' if found else 'MISSED'}  {mutation.name}  ({mutation.tests})", flush=True)
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""Random models on random data, each tool against Flax's own training mode, for as long as one likes.

    python tests/random_models.py --seconds 600 --seed 0

Each seed is a case: a model, data, and what is checked of it (`tests/fuzz`). What fails is saved as a script that runs
the case again, with the model as Flax code. `make fuzz` runs it, with `ARGS` for the options.
"""

import argparse
import collections
import itertools
import os
import pathlib
import time
import traceback

# Compiling is most of the time, and most of that is optimizing programs that run once; say 0 for what users run.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
import jax

ROOT = pathlib.Path(__file__).parents[1]


def arguments(given=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the others follow")
    parser.add_argument("--seconds", type=float, default=600, help="begin no case after so many")
    parser.add_argument("--cases", type=int, help="end after so many")
    parser.add_argument("--parts", type=int, default=5, help="the most parts of a model, besides what lies within")
    parser.add_argument("--tries", type=int, default=60, help="to cut a failed model down; 0 leaves it whole")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "runs" / "fuzz", help="where failures are saved")
    return parser.parse_args(given)


def save(folder, seed, case, error):
    """Writes a failed case as a script, below what it raised."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"seed_{seed}.py"
    told = "".join(traceback.format_exception(error, limit=-8))
    comment = "\n".join(f"# {line}".rstrip() for line in told.splitlines())
    path.write_text(f"# Seed {seed}; run with tests/ and the root on PYTHONPATH\n{comment}\n\n{case.script()}")
    return path


def run(seeds, seconds, parts, out, tries=0):
    """Runs cases one after the other; how often each check ran, and the seeds that failed."""
    from fuzz.drawn import draw_case
    from fuzz.reduce import reduced

    ran, failed, start = collections.Counter(), [], time.monotonic()
    for seed in seeds:
        if time.monotonic() - start > seconds:
            break
        case = draw_case(seed, parts)
        ran[f"nnx {case.check}" if isinstance(case.check, str) else type(case.check).__name__] += 1
        try:
            case.run()
        except Exception as error:
            failed.append(seed)
            print(f"seed {seed} FAILED: {type(error).__name__}: {str(error)[:200]}", flush=True)
            case = reduced(case, tries) if tries else case
            print(f"  saved as {save(out, seed, case, error)}", flush=True)
        if sum(ran.values()) % 50 == 0:
            jax.clear_caches()  # what is compiled is not needed again
            print(f"{sum(ran.values())} cases, {len(failed)} failed, {time.monotonic() - start:.0f} s", flush=True)
    return ran, failed, time.monotonic() - start


def main(given=None):
    """1 if a case fails."""
    asked = arguments(given)
    jax.config.update("jax_num_cpu_devices", 8)
    seeds = itertools.islice(itertools.count(asked.seed), asked.cases)
    ran, failed, took = run(seeds, asked.seconds, asked.parts, asked.out, asked.tries)
    kinds = ", ".join(f"{count} {name}" for name, count in sorted(ran.items()))
    print(f"{sum(ran.values())} cases in {took:.0f} s ({kinds}), from seed {asked.seed}; failed: {failed or 'none'}")
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())

"""How long `import flaxbn` takes, beside `import flax.linen`, each in fresh processes, in turns.

Aim: at most 1.05, since whoever imports flaxbn has imported Flax.
"""

import argparse
import functools
import subprocess
import sys

import harness


def load(module: str) -> None:
    """Imports a module in a process of its own."""
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)


def main() -> None:
    """Times both, and keeps the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    modules = {name: functools.partial(load, name) for name in ("flaxbn", "flax.linen")}
    row = harness.compare(harness.interleave(modules, arguments.rounds), ours="flaxbn")
    rows = [{"what": "import"} | row]
    markdown = harness.table(rows, ["what"])
    print(markdown)
    report = {"machine": harness.machine(), "rounds": arguments.rounds, "rows": rows}
    harness.save("imports", "cpu", report, markdown)


if __name__ == "__main__":
    main()

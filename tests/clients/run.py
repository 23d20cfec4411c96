"""Every tool on every client: the small models of the tests, and those of packages that are installed for it.

Writes the largest differences to benchmarks/results/clients-cpu.md. Arguments choose clients, by parts of their names.
"""

import importlib.metadata
import pathlib
import sys
import warnings

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests")]

from clients.installed import INSTALLED  # noqa: E402
from clients.small import CLIENTS  # noqa: E402
from clients.tools import TOOLS, Client, flax_itself  # noqa: E402

import flaxbn  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "clients-cpu.md"
PACKAGES = ("jax", "flax", "transformers", "sbx-rl")
ABOUT = """# Clients

Every tool on models that others wrote, and on small ones in the manner of well-known ones, by `make clients`.

{versions}. On a CPU, compiled with few optimizations; random weights, three batches of eight.

Against the model's own training mode in float64: statistics are off by the largest difference of a mean in standard
deviations, or the largest relative one of a variance; outputs by the largest difference in root mean squares of the
output. For `plan` and `diagnose` it is the number of layers or findings that are not as they must be; `independent`
passes with 0. "Flax itself" is a batch in the model's own training mode in float32: what float32 does to such a model
without flaxbn.

"""
MOST = 1e-5


def tried(client: Client) -> dict[str, str]:
    """What each tool is off by; of one that fails, its error."""
    found = {}
    for tool, run in TOOLS.items():
        try:
            off = run(client)
        except Exception as error:
            print(f"{tool}: {type(error).__name__}: {error}")
            found[tool] = f"{type(error).__name__}"
        else:
            found[tool] = f"{off:.1e}" if off else "0"
    output, statistics = flax_itself(client)
    return found | {"Flax itself: apply": f"{output:.1e}", "Flax itself: statistics": f"{statistics:.1e}"}


def table(rows: dict[str, dict[str, str]]) -> str:
    columns = [*next(iter(rows.values()))]
    lines = [["client", *columns], ["---"] * (1 + len(columns))]
    lines += [[name, *(row[column] for column in columns)] for name, row in rows.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def write(rows: dict[str, dict[str, str]]) -> None:
    """The page of results."""
    packages = [f"{package} {importlib.metadata.version(package)}" for package in PACKAGES]
    RESULTS.write_text(ABOUT.format(versions=", ".join([f"flaxbn {flaxbn.__version__}", *packages])) + table(rows))


def main(parts: list[str]) -> int:
    warnings.filterwarnings("ignore", ".*TensorFlow and JAX classes are deprecated")
    clients = {**CLIENTS, **INSTALLED}
    chosen = [name for name in clients if not parts or any(part in name for part in parts)]
    rows = {}
    for name in chosen:
        rows[name] = tried(clients[name]())
        print(name, *(f"{tool} {off}" for tool, off in rows[name].items()), sep="\n  ", flush=True)
    if not parts:
        write(rows)
    return int(not all(passes(row[tool]) for row in rows.values() for tool in TOOLS))


def passes(off: str) -> bool:
    """Whether a tool is right: no error, and no difference beyond rounding."""
    return off[0].isdigit() and float(off) <= MOST


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

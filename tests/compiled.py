"""Looking at what jax has compiled: its texts, and the collectives in them."""

import re

import jax


def programs(run):
    """The texts of what `run` compiles."""
    client = jax.devices()[0].client
    before = client.live_executables()
    run()
    return [m.to_string() for new in client.live_executables() if new not in before for m in new.hlo_modules()]


def runs_layers(hlo):
    """Whether a program holds Dense layers."""
    return "dot_general" in hlo


COLLECTIVE = r"= \S.* (?:all-reduce|all-gather|collective-permute|reduce-scatter|all-to-all)(?:-start)?\("


def collectives(hlo):
    """How many there are in all, and how many in loops: in their bodies, and in what these call."""
    computations, name = {}, None
    for line in hlo.splitlines():
        start = re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line)
        name = start[1] if start else name
        computations.setdefault(name, []).append(line)
    texts = {name: "\n".join(lines) for name, lines in computations.items()}
    inside = set(re.findall(r"body=%?([\w.-]+)", hlo))
    while True:
        called = {c for i in inside for c in re.findall(r"%?([\w.-]+)", texts[i].split("\n", 1)[1]) if c in texts}
        if called <= inside:
            break
        inside |= called
    count = {name: len(re.findall(COLLECTIVE, text)) for name, text in texts.items()}
    return sum(count.values()), sum(count[name] for name in inside)

"""The case that belongs to a seed."""

import dataclasses
import re

import numpy as np
from fuzz.case import Case
from fuzz.checks import Apply, Domains, Estimate, Export
from fuzz.data import Data, draw_data
from fuzz.draw import Draw
from fuzz.nnx_case import draw_nnx_case
from fuzz.writer import stored_name

SHAPES = [(5,), (6,), (4, 3), (6, 4), (4, 4, 3), (6, 5, 2)]
DTYPES = ["float32"] * 4 + ["float64"] * 4 + ["bfloat16", "complex64"]


def draw_check(draw):
    """A check, the more often the more it has to go wrong."""
    kind = draw.one_of(
        ["apply", "apply", "precise", "precise", "precise", "exact", "exact", "exact", "domains", "export"]
    )
    if kind == "apply":
        return Apply(draw.one_of(["batch"] * 5 + ["running"]), draw.one_of(["jit", "jit", "eager", "vmap", "sharded"]))
    if kind == "export":
        return Export()
    sharded = draw.chance(0.25)
    if kind == "precise":
        return Estimate("precise", sharded, by_device=sharded and draw.chance(0.3))
    if kind == "domains":
        return Domains(draw.one_of(["precise", "exact"]))
    return Estimate("exact", sharded, int(draw.rng.integers(1, 20_000)) if draw.chance(0.4) else None)


def draw_case(seed, parts=5):
    """The case of a seed, a model of up to so many parts and what lies within; one in ten is of nnx."""
    draw = Draw(np.random.default_rng(seed))
    if draw.chance(0.1):
        return draw_nnx_case(draw)
    shape, dtype, check = draw.one_of(SHAPES), draw.one_of(DTYPES), draw_check(draw)
    estimates = isinstance(check, Estimate)
    if isinstance(check, Apply) and check.statistics == "batch" and draw.chance(0.3):
        check = Apply("batch", "gradient")
    if estimates and check.by_device:
        samples = 8 * int(draw.rng.integers(4, 8))
        data = Data(int(draw.rng.integers(2**31)), samples, shape, dtype, samples)
        return Case(draw.model(shape, data.is_complex, 1 + draw.rng.integers(parts)), data, check)
    smallest = (1 if check.method == "exact" else 4) if estimates else 8
    data = draw_data(draw.rng, shape, dtype, smallest=smallest, weighted=estimates)
    in_parts = data.is_list and len(data.rows) > 1 and data.num_samples is None
    if type(check) is Estimate and check.method == "precise" and in_parts and draw.chance(0.5):
        check = dataclasses.replace(check, earlier=1)
    nodes = draw.model(shape, data.is_complex, 1 + draw.rng.integers(parts))
    case = Case(nodes, data, check)
    if estimates and not case.has_merged and draw.chance(0.15):
        names = sorted({stored_name(name) for name in re.findall(r'"(norm_\d+)"', case.code)} - set(case.unknown))
        case = dataclasses.replace(case, left_out=(draw.one_of(names),)) if len(names) > 1 else case
    return case

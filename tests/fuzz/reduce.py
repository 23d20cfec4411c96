"""Cuts a failed case down: fewer parts, as long as it fails in the same way."""

from dataclasses import fields, replace
from itertools import islice

from fuzz.nodes import Node


def smaller(nodes):
    """All ways to leave out one part, or to put what lies within one in its place; the larger cuts come first."""
    for i in range(len(nodes)):
        yield (*nodes[:i], *nodes[i + 1 :])
    for i, node in enumerate(nodes):
        for field in fields(node):
            body = getattr(node, field.name)
            if not isinstance(body, tuple) or not all(isinstance(one, Node) for one in body):
                continue
            yield (*nodes[:i], *body, *nodes[i + 1 :])
            for other in smaller(body):
                yield (*nodes[:i], replace(node, **{field.name: other}), *nodes[i + 1 :])


def failure(case):
    """What tells one failure from another: numbers that are off are alike, errors are by their words."""
    try:
        case.run()
    except Exception as error:
        return type(error), "" if "off by" in str(error) else str(error)[:30]
    return None


def reduced(case, tries=60):
    """The smallest case that is found in so many tries; one whose parts no longer fit fails in another way."""
    wanted = failure(case) if hasattr(case, "nodes") else None  # those of nnx are small
    while wanted and tries > 0:
        for nodes in islice(smaller(case.nodes), tries):
            tries -= 1
            if failure(replace(case, nodes=nodes)) == wanted:
                case = replace(case, nodes=nodes)
                break
        else:
            break
    return case

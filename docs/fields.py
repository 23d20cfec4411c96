"""Signatures of Flax modules, whose fields are the arguments of a constructor that is nowhere written."""

from typing import Any

import griffe

LAYERS = ("BatchNorm", "BatchRenorm")


class FlaxFields(griffe.Extension):
    """Gives each layer a constructor with its fields, and those of its base, in their order."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Called once the whole package is read."""
        if pkg.name != "flaxbn":
            return
        fields: list[griffe.Parameter] = []
        for name in LAYERS:
            layer = pkg["layers.linen"][name]
            fields += [
                griffe.Parameter(
                    attribute.name,
                    annotation=attribute.annotation,
                    default=attribute.value,
                    kind=griffe.ParameterKind.positional_or_keyword,
                )
                for attribute in layer.attributes.values()
                if attribute.annotation is not None
            ]
            layer.set_member("__init__", griffe.Function("__init__", parameters=griffe.Parameters(*fields)))

"""An extension of griffe, which collects the docstrings for the API reference.

The reference shows options and fixtures the way a caller sees them. `takes_options` and `option`
declare each option only once: the extension writes out the keyword arguments of methods, and the
default and description of each option. A fixture appears as a name with the type of its value.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import griffe

from pgtemp.options.server import ServerOptions, default_of


class Extension(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        parameters = []
        for spec in fields(ServerOptions):
            option = pkg["options.server.ServerOptions"][spec.name]
            option.value = repr(default_of(spec))
            option.docstring = griffe.Docstring(spec.metadata["help"], parent=option)
            kind = griffe.ParameterKind.keyword_only
            parameters.append(
                griffe.Parameter(
                    spec.name, annotation=option.annotation, kind=kind, default=option.value
                )
            )
        for handle in ("pgtempdb.PgTempDB", "cluster.Cluster", "aio.PgTempDB", "aio.Cluster"):
            pkg[handle]["__init__"].parameters = griffe.Parameters(*parameters)
        plugin = pkg["pytest_plugin"]
        for name, function in list(plugin.functions.items()):
            if name.startswith("pgtemp"):
                plugin[name] = _fixture(function)


def _fixture(function: griffe.Function) -> griffe.Attribute:
    value = function.returns
    if isinstance(value, griffe.ExprSubscript) and str(value.left) == "Iterator":
        value = value.slice
    return griffe.Attribute(function.name, annotation=value, docstring=function.docstring)

"""Heads and backbones that other installed packages bring, by entry points of theirs.

A package names them in its own ``pyproject.toml``: ``[project.entry-points."soap_net.heads"]`` and
``"soap_net.backbones"``, each line ``name = "module:object"``. It is imported where settings ask for that name, and for
no other reason but `soap-net info`; the name in a settings file is looked up among these lines and is itself no module.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

from soap_net.errors import UserError

Kind = Literal["head", "backbone"]
KINDS: tuple[Kind, ...] = ("head", "backbone")


def found(kind: Kind) -> dict[str, list[EntryPoint]]:
    """Those of all installed packages by name, unimported; of a name that two packages bring, both."""
    by_name: dict[str, dict[object, EntryPoint]] = {}
    for entry in entry_points(group=f"soap_net.{kind}s"):
        # A folder that is on the path twice is one package all the same.
        by_name.setdefault(entry.name, {}).setdefault((package(entry), entry.value), entry)
    return {name: [*entries.values()] for name, entries in sorted(by_name.items())}


def load(kind: Kind, name: str) -> Any:
    """The object that the entry point ``name`` names.

    Raises:
        UserError: more than one package brings it, or its package can't be imported; names the package.
    """
    entry, *others = found(kind)[name]
    if others:
        packages = " and ".join(map(package, (entry, *others)))
        raise UserError(f"{kind} {name!r} is brought by {packages}: uninstall all but one")
    try:
        return entry.load()
    except Exception as error:  # whatever another's code does on import
        why = " ".join(str(error).split())
        raise UserError(
            f"{kind} {name!r} is in the package {package(entry)}, where {entry.value} can't be imported: "
            f"{type(error).__name__}: {why}"
        ) from error


def package(entry: EntryPoint) -> str:
    """The package that brings it, with its version."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unnamed package"


def status(kind: Kind) -> dict[str, str]:
    """By name, the package that brings it, or why it can't be had; imports them all."""
    lines = {}
    for name, entries in found(kind).items():
        try:
            load(kind, name)
            lines[name] = f"of {package(entries[0])}"
        except UserError as error:
            lines[name] = f"absent: {error}"
    return lines

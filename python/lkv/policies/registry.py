"""All methods by name: the same names in `lkv.Cache`, `lkv eval`, `lkv lm-eval` and the docs.

A package outside adds its own by an entry point, in its pyproject.toml:

    [project.entry-points."lkv.policies"]
    keynorm = "my_package:KeyNorm"

The object is called without arguments and returns a policy.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points

from lkv.policies.catalog import CATALOG
from lkv.policies.protocol import NEEDS, SCOPES, Ahead, Policy

GROUP = "lkv.policies"  # of entry points
POLICIES: dict[str, Callable[[], Policy]] = {name: entry.make for name, entry in CATALOG.items()}


def names() -> list[str]:
    """All that `get` takes: the methods of this package, then those of installed packages."""
    return [*POLICIES, *sorted(_outside())]


def get(policy: str | Policy) -> Policy:
    """A policy by its name, with its defaults, or the object itself.

    Raises:
        ValueError: for a name that is not known or that two packages have, needs or a scope that are not.
        TypeError: for an object without the attributes and methods of the protocol.
    """
    if isinstance(policy, str):
        return _by_name(policy)
    early = isinstance(policy, Ahead) and getattr(policy, "scope", None) == "layer"  # its budgets are known before
    members = ("needs", "scope", "sink", "window", "score", *(() if early else ("budgets",)))
    missing = [name for name in members if not hasattr(policy, name)]
    if isinstance(policy, type) or missing:
        lack = f" without {', '.join(missing)}" if missing else ""
        raise TypeError(f"lkv.policies: expected a name or a policy, got {policy!r}{lack}")
    if policy.scope not in SCOPES or not policy.needs <= NEEDS:
        raise ValueError(
            f"lkv.policies: expected a scope of {', '.join(SCOPES)} and needs of {', '.join(sorted(NEEDS))}, "
            f"got {policy.scope!r} and {sorted(policy.needs)}"
        )
    return policy


def _by_name(name: str) -> Policy:
    if name in POLICIES:
        return POLICIES[name]()
    points = _outside().get(name, [])
    if not points:
        hint = ": lkv.load(path, model) makes the policy of a checkpoint" if name == "lkv" else ""
        raise ValueError(f"lkv.policies: expected one of {', '.join(sorted(names()))}, got {name!r}{hint}")
    if len(points) > 1:
        values = ", ".join(sorted(point.value for point in points))
        raise ValueError(
            f"lkv.policies: expected one package with a policy {name!r}, got {values}: uninstall all but one"
        )
    return get(points[0].load()())


def _outside() -> dict[str, list[EntryPoint]]:
    """Entry points of other packages by name. A name of this package stays with it."""
    found: dict[str, dict[str, EntryPoint]] = {}
    for point in entry_points(group=GROUP):
        if point.name not in POLICIES:
            found.setdefault(point.name, {})[point.value] = point  # a package may be found on two paths
    return {name: list(points.values()) for name, points in found.items()}

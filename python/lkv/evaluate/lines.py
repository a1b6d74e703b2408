"""How the line of a method looks: the same in all pictures, no colour twice, and told apart without colour too."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from matplotlib import colormaps
from matplotlib.colors import to_hex

# Lines across, of the full cache and of the protected rows alone.
BASELINES: dict[str, dict[str, Any]] = {"full": {"color": "0.5", "ls": "--"}, "floor": {"color": "0.5", "ls": ":"}}
KNOWN = (
    "lkv", "kvzip", "oracle", "snapkv", "adakv", "streaming_llm", "random", "uniform+oracle", "uniform+kvzip",
    "uniform+lkv-t", "lkv-h+snapkv", "lkv-h+kvzip",
)  # fmt: skip
MARKERS = "osD^vPX*<>phd8H"
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 3)))
# The ten strong colours without the grey, then the ten light ones.
COLORS = [to_hex(colormaps["tab20"](i)) for first in (0, 1) for i in range(first, 20, 2) if i not in (14, 15)]


def styles(methods: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and dashes of each method that is no baseline. Other names than `KNOWN` come after these."""
    names = [name for name in methods if name not in BASELINES]
    order = [*KNOWN, *(name for name in dict.fromkeys(names) if name not in KNOWN)]
    colors = COLORS
    if len(order) > len(COLORS):
        colors = [to_hex(colormaps["turbo"]((i + 0.5) / len(order))) for i in range(len(order))]
    return {
        name: {"color": colors[i], "marker": MARKERS[i % len(MARKERS)], "ls": DASHES[i % len(DASHES)]}
        for i, name in enumerate(order)
        if name in names
    }

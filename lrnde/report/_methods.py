"""The methods: their order, and their colours."""

from collections.abc import Sequence

# Those of the paper, in the order of its tables.
METHODS = ("vanilla", "unbiased", "biased")

# One colour a method in every figure, from the palette of Okabe and Ito (2008), which
# colour-blind readers can tell apart. The order is that of tables and legends.
COLORS = {
    "vanilla": "#000000",
    "unbiased": "#0072B2",
    "biased": "#D55E00",
    "error": "#009E73",
    "global-error": "#CC79A7",
    "global-stiffness": "#56B4E9",
    "steer": "#E69F00",
    "taylor": "#F0E442",
    # Beyond the palette: methods that no figure shows without its name.
    "unbiased-4": "#4D4D9F",
    "kinetic": "#8C564B",
    "steer+global-error": "#9E9E9E",
    "stiffness-unbiased": "#1B4F72",
    "stiffness-biased": "#873600",
}


def ordered(methods: Sequence[str]) -> list[str]:
    """Methods without repeats: those of `COLORS` in its order, then the others."""
    known = list(COLORS)
    place = {method: known.index(method) for method in methods if method in known}
    return sorted(set(methods), key=lambda method: (place.get(method, 99), method))


def by_method(records: Sequence[dict]) -> dict[str, list[dict]]:
    """Groups the records of one experiment in one tier."""
    origins = {(record["experiment"], record["tier"]) for record in records}
    if len(origins) > 1:
        raise ValueError(
            f"the records come from {len(origins)} experiments or tiers:"
            f" {sorted(origins)}. Give those of one."
        )
    methods = ordered([record["method"] for record in records])
    return {m: [r for r in records if r["method"] == m] for m in methods}

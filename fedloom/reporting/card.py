"""Write a result's model card: the README.md that a hub shows, beside the run's adapter and in every export.

Its facts come from the recipe, the summary, and the declarations of corpora and carriers. A card is made to be published:
it contains no path of this machine, and no client's name except the one whose own result it is. Unknown facts are called
unknown.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import yaml

from fedloom.common import pypi as carriers
from fedloom.common import registry
from fedloom.common.files import folder_name, write_bytes
from fedloom.common.version import __version__
from fedloom.data.corpus import SITES
from fedloom.data.hub import HubRef
from fedloom.data.source import Source
from fedloom.federation.record.run_folder import RunFolder
from fedloom.models.loading import BUILTIN, RANDOM
from fedloom.recipe.recipe import Recipe
from fedloom.reporting import formats
from fedloom.reporting.summary_types import Pair, Summary
from fedloom.reporting.usage import usage

FILE = "README.md"


#: Sections of a recipe that determine the model. The others say where it was trained and what was logged.
SECTIONS = (
    "model", "data", "split", "adapter", "algorithm", "train", "federation", "operators", "privacy", "devices", "hooks",
    "seed",
)  # fmt: skip


def write_card(folder: Path, recipe: Recipe, summary: Summary | None, client: str | None = None) -> None:
    """Write the card of the result in `folder`; replaces an older card.

    Args:
        summary: the content of summary.json; None where the run has none yet. The card then has no numbers.
        client: the client whose own result it is; None where all clients share it.
    """
    write_bytes(folder / FILE, card(folder, recipe, summary, client).encode())


def write_cards(run: RunFolder, recipe: Recipe, summary: Summary, clients: Iterable[str]) -> None:
    """Write the cards of the results in a run's folder: the one for all clients, or each client's."""
    if (run / "adapter").is_dir():
        write_card(run / "adapter", recipe, summary)
    for client in clients:
        own = run / "adapters" / folder_name(client)
        if own.is_dir():
            write_card(own, recipe, summary, client)


def card(folder: Path, recipe: Recipe, summary: Summary | None, client: str | None = None) -> str:
    """Return the text of the card. The files in `folder` decide the result's format: peft, merged or gguf."""
    base, corpus = _Base.of(recipe), None if _data_at_sites(summary) else _corpus(recipe)
    adapter = (folder / "adapter_config.json").is_file()
    form = "gguf" if list(folder.glob("*.gguf")) else "peft" if adapter else "merged"
    title = (recipe.name or "A run") + (f", {client}'s own" if client else "")
    what = {
        "peft": f"An adapter ({recipe.adapter.method}) for {base.shown}",
        "merged": f"{base.shown}, fine-tuned",
        "gguf": f"{base.shown}, fine-tuned, for llama.cpp",
    }[form]
    parts = [
        _front_matter(base, corpus, recipe, form),
        f"# {title}",
        f"{what}. Made with fedloom {__version__}, federated fine-tuning of language models."
        + (f" The recipe: {recipe.description.rstrip('.')}." if recipe.description else ""),
        "## Data\n\n" + _data(corpus, recipe, summary),
        "## Training\n\n" + "".join(f"- {line}\n" for line in _training(recipe, summary)).rstrip(),
        "## Numbers\n\n" + _numbers(summary, client),
        "## Privacy\n\n" + _privacy(summary.get("privacy") if summary else None),
        "## Use\n\n" + usage(folder, form, base.hub, recipe),
        "## Licence\n\n"
        f"Of the base model: {base.license or 'unknown to fedloom, see its own card'}. Of the data: "
        f"{_license(corpus, recipe, summary)}. Both are given as their publishers state them. Both limit how this result "
        "may be used.",
        "## Limits\n\n" + "".join(f"- {line}\n" for line in _limits(base, recipe, summary)).rstrip(),
        "## Recipe\n\nSettings that differ from fedloom's defaults; `fedloom run` takes them as a file.\n\n```yaml\n"
        + settings(recipe)
        + "```",
    ]
    return "\n\n".join(parts) + "\n"


class _Base:
    """The base model: its hub id, how the card names it, its licence, and a note on its limits."""

    def __init__(self, hub: str | None, shown: str, license: str = "", note: str = "") -> None:
        self.hub, self.shown, self.license, self.note = hub, shown, license, note

    @classmethod
    def of(cls, recipe: Recipe) -> _Base:
        name = recipe.model.name
        if name in BUILTIN:
            carrier = carriers.named(BUILTIN[name][0])
            return cls(carrier.upstream, carrier.upstream, carrier.license, carrier.altered)
        if name == RANDOM:
            return cls(None, f"`{name}`", note="The base has random weights: it is for tests only.")
        if Path(name).expanduser().is_dir() or HubRef.parse(name) is None:
            return cls(None, f"`{PurePath(name).name}` (a model of the maker's own)")
        return cls(name, name)


def _data_at_sites(summary: Summary | None) -> bool:
    """Return whether the data were the sites' own, whatever corpus the recipe names."""
    return summary is not None and summary["corpus_source"] == SITES


def _corpus(recipe: Recipe) -> Source | None:
    """Return the registered corpus; None for the user's own data."""
    return registry.corpora.get(recipe.data.corpus) if recipe.data.corpus else None


def _hub_of_data(corpus: Source | None, recipe: Recipe) -> str | None:
    """Return the hub id of the data set, or None."""
    if corpus is not None:
        return corpus.hub.id if corpus.hub else None
    path = recipe.data.path or ""
    found = None if Path(path).expanduser().exists() else HubRef.parse(path)
    return found.id if found else None


def _front_matter(base: _Base, corpus: Source | None, recipe: Recipe, form: str) -> str:
    """Return the YAML metadata that a hub reads: https://huggingface.co/docs/hub/model-cards."""
    data = _hub_of_data(corpus, recipe)
    values: dict[str, Any] = {
        "base_model": base.hub,
        "base_model_relation": ("adapter" if form == "peft" else "finetune") if base.hub else None,
        "library_name": {"peft": "peft", "merged": "transformers"}.get(form),
        "pipeline_tag": "text-generation",
        "license": base.license.lower() or None,
        "language": [corpus.language] if corpus and corpus.language else None,
        "datasets": [data] if data else None,
        "tags": ["fedloom", "federated-learning", recipe.algorithm.name, recipe.adapter.method]
        + (["gguf"] if form == "gguf" else []),
    }
    text = yaml.safe_dump({k: v for k, v in values.items() if v is not None}, sort_keys=False, allow_unicode=True)
    return f"---\n{text}---"


def _license(corpus: Source | None, recipe: Recipe, summary: Summary | None) -> str:
    if summary is not None:
        return str(summary["corpus_license"])
    return recipe.data.license or (corpus.license if corpus else "unknown")


def _data(corpus: Source | None, recipe: Recipe, summary: Summary | None) -> str:
    if _data_at_sites(summary):
        text = "The sites' own, which nobody else has seen."
    elif corpus is not None:
        text = f"`{corpus.name}`: {corpus.title}, {corpus.homepage}."
    elif hub := _hub_of_data(None, recipe):
        text = f"`{hub}` on the Hugging Face hub."
    else:
        text = "Data of the maker's own."
    text += f" Licence: {_license(corpus, recipe, summary)}."
    if summary is not None:
        data = summary["data"]
        text += (
            f" {data['train']:,} examples to train on, {data['test']:,} held out, of {summary['clients']:,} clients "
            f"(split: {recipe.split.splitter or 'their own'})."
        )
    return text


def _training(recipe: Recipe, summary: Summary | None) -> Iterator[str]:
    adapter, train = recipe.adapter, recipe.train
    where = "between sites" if _data_at_sites(summary) else "simulated on one machine that has all the data"
    yield f"algorithm: {recipe.algorithm.name}, {where}"
    size = f", {summary['adapter']['parameters']:,} trained numbers" if summary else ""
    rank = f", rank {adapter.rank}, alpha {adapter.alpha:g}" if adapter.method in {"lora", "adalora"} else ""
    yield f"method: {adapter.method}{rank}{size}"
    rounds = summary["rounds"] if summary else recipe.federation.rounds
    each = f"{train.steps} steps" if train.steps else f"{train.epochs:g} epochs"
    yield f"{rounds} rounds; a sampled client trains for {each} with batches of {train.batch_size} examples"
    yield f"{train.optimizer}, learning rate {train.lr:g}, {train.objective}"
    if summary:
        cost = summary["cost"]
        yield f"{cost['train_tokens']:,} tokens, {cost['steps']:,} optimiser steps of all clients together"
        if summary["failures"]:
            yield f"{summary['failures']:,} failures of clients; their rounds continued without them"


def _numbers(summary: Summary | None, client: str | None) -> str:
    if summary is None:
        return "None: the run had no summary when this was written."
    rows = list(_evaluation_rows(summary, client))
    if not rows:
        return "None: no data was held out."
    head = "| on held-out data | before | after |\n|---|---|---|\n"
    text = head + "".join(
        f"| {what} | {formats.text(pair['before'], kind)} | {formats.text(pair['after'], kind)} |\n"
        for what, kind, pair in rows
    )
    return (
        text
        + "\nA loss is a mean over tokens, in nats. The worst client ends with the highest loss or the lowest score."
    )


def _evaluation_rows(summary: Summary, client: str | None) -> Iterator[tuple[str, str, Pair]]:
    score, loss = summary["score"], summary["loss"]
    own = summary["per_client"].get(client) if client else None
    right = f"right answers, {score['suite']}"
    if client:
        if own and own["loss"]["after"] is not None:
            yield "loss, on this client's data", "loss", own["loss"]
        if own and own["score"]["after"] is not None:
            yield f"{right}, on this client's questions", "percent", own["score"]
        return
    if loss["after"] is not None:
        yield "loss", "loss", loss
    if loss["worst_client"] is not None:
        yield "loss, worst client", "loss", loss["worst_client"]
    if score["after"] is not None:
        yield f"{right}, {score['questions']:,} questions", "percent", score
    if score["worst_client"] is not None:
        yield f"{right}, worst client", "percent", score["worst_client"]


def _privacy(spent: Mapping[str, Any] | None) -> str:
    if spent is None or spent["epsilon"] is None:
        return "No differential privacy: an attacker may be able to extract parts of the clients' data from the model."
    text = (
        f"Client-level differential privacy: ε = {spent['epsilon']:.3g} at δ = {spent['delta']:.3g}, noise multiplier "
        f"{spent['noise']:.3g} added at the {spent['where']}, clip {spent['clip']:.3g}."
    )
    return text + (
        " The noise follows from the recipe's seed: whoever knows the seed can remove it." if spent["seeded"] else ""
    )


def _limits(base: _Base, recipe: Recipe, summary: Summary | None) -> Iterator[str]:
    yield "Evaluated only on data like the training data, by the numbers above. Not tested for bias or harm."
    if base.note:
        yield base.note
    if recipe.model.quantization:
        yield f"Trained on the base in {recipe.model.quantization}; with another precision the numbers differ."
    cut = summary["data"].get("truncated") if summary and "data" in summary else 0
    if cut:
        yield f"{cut:,} examples were truncated at {recipe.data.max_length} tokens."


def settings(recipe: Recipe) -> str:
    """Return as YAML the recipe's settings that differ from the defaults. Of a path only the last part is kept."""
    given, default = recipe.resolved(), Recipe().resolved()
    kept = {k: _difference(given[k], default[k]) for k in SECTIONS if given[k] != default[k]}
    named = {"name": recipe.name} if recipe.name else {}
    return yaml.safe_dump(_without_paths({**named, **kept}), sort_keys=False, allow_unicode=True)


def _difference(given: Any, default: Any) -> Any:
    if not isinstance(given, Mapping) or not isinstance(default, Mapping):
        return given
    named = {k: given[k] for k in ("name", "corpus", "steps") if given.get(k) is not None}  # other keys depend on these
    return {**named, **{k: _difference(v, default.get(k)) for k, v in given.items() if v != default.get(k)}}


def _without_paths(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_paths(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_paths(v) for v in value]
    if isinstance(value, str) and value.startswith(("/", "~", "./", "../")):
        return PurePath(value).name
    return value

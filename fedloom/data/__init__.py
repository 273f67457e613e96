"""Data: where a corpus comes from, how it is split among clients, and how it is written for a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedloom.common.lazy import lazy

if TYPE_CHECKING:
    from fedloom.data.batching import Batch as Batch
    from fedloom.data.corpus import Corpus as Corpus
    from fedloom.data.corpus import Example as Example
    from fedloom.data.corpus import Partition as Partition
    from fedloom.data.corpus import Shard as Shard
    from fedloom.data.hub import HubRef as HubRef
    from fedloom.data.source import Grouping as Grouping
    from fedloom.data.source import Request as Request
    from fedloom.data.source import Rows as Rows
    from fedloom.data.source import Source as Source

__all__, __getattr__, __dir__ = lazy(
    __name__,
    {
        "Batch": "fedloom.data.batching",
        "Corpus": "fedloom.data.corpus",
        "Example": "fedloom.data.corpus",
        "Grouping": "fedloom.data.source",
        "HubRef": "fedloom.data.hub",
        "Partition": "fedloom.data.corpus",
        "Request": "fedloom.data.source",
        "Rows": "fedloom.data.source",
        "Shard": "fedloom.data.corpus",
        "Source": "fedloom.data.source",
    },
)

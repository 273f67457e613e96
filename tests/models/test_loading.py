"""Loading a base model."""

from __future__ import annotations

import threading

from transformers import PreTrainedModel
from transformers.utils import logging

from fedloom.models.loading import load_base
from fedloom.recipe.recipe import ModelConfig
from tests.helpers import tiny


def test_two_threads_load_one_after_the_other(tmp_path):
    """transformers replaces `tie_weights` of all models while it loads one; overlapping loads used to leave it replaced."""
    config = ModelConfig(name=str(tiny.save_model(tmp_path / "tied", tiny.causal_lm(tie_word_embeddings=True))))
    logging.set_verbosity_warning()
    before, loaded, together = PreTrainedModel.tie_weights, [], threading.Barrier(4)

    def load() -> None:
        together.wait()
        for _ in range(3):
            loaded.append(load_base(config))

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert PreTrainedModel.tie_weights is before
    assert logging.get_verbosity() == logging.WARNING
    assert len(loaded) == 12
    for base in loaded:
        assert base.model.lm_head.weight is base.model.model.embed_tokens.weight

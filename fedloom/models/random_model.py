"""A Llama of five thin layers with random weights and one token per byte: it learns little and runs very fast.

Use it to try a recipe, an algorithm or a benchmark from end to end without a download. The weights come from a seed, so
they are the same everywhere. It has five layers, enough for algorithms that cut the model.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 300


def build_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per byte, ids from 3; <pad>, <s>, </s> are 0, 1, 2.

    A text begins with <s>, as Llama's do.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )
    made.chat_template = chat_template
    return made


def build_model(folder: Path) -> Path:
    """Build the model in `folder` unless it is there, and return `folder`. Several processes may call this at once."""
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        begun = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            tie_word_embeddings=False,
            initializer_range=0.2,
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            LlamaForCausalLM(config).save_pretrained(begun)
        build_tokenizer().save_pretrained(begun)
        try:
            begun.rename(folder)
        except OSError:  # another process was first
            shutil.rmtree(begun)
    return folder

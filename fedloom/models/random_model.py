"""A Llama of five thin layers with random weights and one token a byte: it learns little, and runs in no time.

For trying a recipe, an algorithm or a benchmark from end to end without a download. Made from a seed, so that it is the
same everywhere. Five layers, so that algorithms that cut the model have layers to cut.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 300


def tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token a byte, ids from 3; <pad>, <s>, </s> are 0, 1, 2, and a text begins with <s> as Llama's do."""
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


def made(folder: Path) -> Path:
    """The model in `folder`, made there where it is not yet; several processes may ask at once."""
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
        tokenizer().save_pretrained(begun)
        try:
            begun.rename(folder)
        except OSError:  # another process was first
            shutil.rmtree(begun)
    return folder

"""A tokenizer in a GGUF file: tokens with their types, merges, special ids, and the rule that splits a text.

llama.cpp does not read a tokenizer's own rule for splitting a text before the merges. A file names one of llama.cpp's
built-in rules (`tokenizer.ggml.pre`), and a wrong name gives other tokens without an error. So this file recognises
each
rule by its steps, and refuses a tokenizer with any other. It supports byte-level BPE only, as in GPT-2, Llama 3, Qwen2
and SmolLM2. It does not know about weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gguf
from transformers import PreTrainedTokenizerBase

from fedloom.common.errors import UserError

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


#: Steps that split a text → (llama.cpp's name of the rule, whether it keeps a piece that is itself a token whole).
SPLIT_RULES: dict[tuple[str, ...], tuple[str, bool]] = {
    ("words",): ("gpt-2", False),
    ("digits", "words"): ("smollm", False),
    (_LLAMA3, "bytes"): ("llama-bpe", True),
    (_QWEN2, "bytes"): ("qwen2", False),
}


#: A merge that never applies, since no text contains these pieces: llama.cpp reads no file without merges.
_NO_MERGE = "<none> <none>"


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as a GGUF file describes it.

    Attributes:
        tokens: the text of each id: ordinary ones in GPT-2's byte alphabet, added ones as they are.
        types: the `gguf.TokenType` of each id.
        merges: pairs separated by a space, by priority.
        rule: llama.cpp's name of the rule that splits a text.
        special: bos, eos, unk or pad → its id.
        adds_bos, adds_eos: whether every text gets the bos token before it and the eos token after it.
        chat_template: Jinja, or None.
    """

    tokens: Sequence[str]
    types: Sequence[int]
    merges: Sequence[str]
    rule: str
    special: Mapping[str, int]
    adds_bos: bool
    adds_eos: bool
    chat_template: str | None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, rows: int) -> Vocabulary:
        """Read the tokenizer of a model whose embedding has `rows` rows.

        Raises UserError if llama.cpp does not support it.
        """
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise _unsupported("it has no tokenizer.json")
        declared = json.loads(backend.to_str())
        model = declared["model"]
        if model["type"] != "BPE" or model.get("byte_fallback"):
            raise _unsupported(f"its model is {'SentencePiece' if model.get('byte_fallback') else model['type']}")
        if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
            raise _unsupported("it marks where words begin or end")
        if (declared["normalizer"] or {"type": "NFC"})["type"] != "NFC":  # llama.cpp skips NFC; texts usually have it
            raise _unsupported(f"it rewrites texts ({declared['normalizer']['type']})")
        merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
        tokens, types = _tokens(model["vocab"], declared["added_tokens"], rows)
        begins, ends = _adds_bos_eos(tokenizer)
        special = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
        template = tokenizer.chat_template
        return cls(
            tokens,
            types,
            merges or [_NO_MERGE],
            _find_rule(declared["pre_tokenizer"], bool(model.get("ignore_merges"))) if merges else "gpt-2",
            {name: int(i) for name, i in special.items() if i is not None},
            begins,
            ends,
            template if isinstance(template, str) else (template or {}).get("default"),
        )

    def write(self, writer: gguf.GGUFWriter) -> None:
        """Write the vocabulary into a file's header."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.rule)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        for name, number in self.special.items():
            getattr(writer, f"add_{name}_token_id")(number)
        writer.add_add_bos_token(self.adds_bos)
        writer.add_add_eos_token(self.adds_eos)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def _tokens(vocab: Mapping[str, int], added: Sequence[Mapping[str, Any]], rows: int) -> tuple[list[str], list[int]]:
    """Return (the token of each row, its type); rows without a token get names that no text contains."""
    tokens = [f"[PAD{i}]" for i in range(rows)]
    types = [int(gguf.TokenType.UNUSED)] * rows
    for token, number in vocab.items():
        tokens[number], types[number] = token, int(gguf.TokenType.NORMAL)
    for extra in added:
        if extra["lstrip"] or extra["rstrip"] or extra["single_word"]:
            raise _unsupported(f"its token {extra['content']!r} removes spaces around it")
        kind = gguf.TokenType.CONTROL if extra["special"] else gguf.TokenType.USER_DEFINED
        tokens[extra["id"]], types[extra["id"]] = extra["content"], int(kind)
    return tokens, types


def _find_rule(declared: Mapping[str, Any] | None, whole_pieces: bool) -> str:
    """Return llama.cpp's name for a `pre_tokenizer` of tokenizer.json."""
    steps = [] if declared is None else declared.get("pretokenizers", [declared])
    described = tuple(_describe_step(step) for step in steps)
    name, takes_whole = SPLIT_RULES.get(described, ("", False))
    if not name or takes_whole != whole_pieces:
        raise _unsupported(
            f"llama.cpp has no rule that splits texts as it does ({', '.join(described) or 'not at all'})"
        )
    return name


def _describe_step(step: Mapping[str, Any]) -> str:
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use}:
            return "words" if use else "bytes"
        case {"type": "Digits", "individual_digits": True}:
            return "digits"
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            return str(pattern)
    return str(step["type"])


def _adds_bos_eos(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Return whether the tokenizer puts bos before a text, and eos after it."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = tokenizer("a")["input_ids"]
    for begins in (False, True):
        for ends in (False, True):
            if ids == [tokenizer.bos_token_id] * begins + bare + [tokenizer.eos_token_id] * ends:
                return begins, ends
    raise _unsupported("it adds more to a text than its bos and eos tokens")


def _unsupported(why: str) -> UserError:
    return UserError(
        f"this model's tokenizer cannot be written as GGUF: {why}. Only byte-level BPE is supported, as in "
        f"{', '.join(name for name, _ in SPLIT_RULES.values())}: use --format merged, and llama.cpp's own converter"
    )

"""A tokenizer as a GGUF file holds one: tokens with their types, merges, special ids, and how texts are cut into pieces.

llama.cpp does not read a tokenizer's own rule for cutting a text before the merges begin. A file names one of the rules
that are built into llama.cpp (`tokenizer.ggml.pre`), and the wrong name gives other tokens without a word. So a rule is
recognised by what it is, step by step, and a tokenizer with any other is refused. Byte-level BPE alone, as GPT-2, Llama 3,
Qwen2 and SmolLM2 have it. This file does not know about weights.
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


#: How a text is cut, step by step → (llama.cpp's name for it, whether it then takes a piece that is a token as it is).
CUTS: dict[tuple[str, ...], tuple[str, bool]] = {
    ("words",): ("gpt-2", False),
    ("digits", "words"): ("smollm", False),
    (_LLAMA3, "bytes"): ("llama-bpe", True),
    (_QWEN2, "bytes"): ("qwen2", False),
}


#: A merge that never happens, since no text's piece is cut into these: llama.cpp reads no file without merges.
_NO_MERGE = "<none> <none>"


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer.

    Attributes:
        tokens: the text of each id. Ordinary ones in GPT-2's alphabet of bytes, added ones as they are.
        types: of each, a `gguf.TokenType`.
        merges: pairs with a space between them, in the order in which they are tried.
        cut: llama.cpp's name for how a text is cut into pieces.
        special: which (bos, eos, unk, pad) → id.
        begins, ends: whether every text gets the bos in front and the eos behind it.
        chat_template: Jinja, or None.
    """

    tokens: Sequence[str]
    types: Sequence[int]
    merges: Sequence[str]
    cut: str
    special: Mapping[str, int]
    begins: bool
    ends: bool
    chat_template: str | None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, rows: int) -> Vocabulary:
        """The vocabulary of a model whose embedding has `rows` rows. Raises UserError where llama.cpp has none such."""
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise _not_known("it has no tokenizer.json")
        declared = json.loads(backend.to_str())
        model = declared["model"]
        if model["type"] != "BPE" or model.get("byte_fallback"):
            raise _not_known(f"its model is {'SentencePiece' if model.get('byte_fallback') else model['type']}")
        if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
            raise _not_known("it marks where words begin or end")
        if (declared["normalizer"] or {"type": "NFC"})["type"] != "NFC":  # llama.cpp leaves NFC out, which texts are in
            raise _not_known(f"it rewrites texts ({declared['normalizer']['type']})")
        merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
        tokens, types = _tokens(model["vocab"], declared["added_tokens"], rows)
        begins, ends = _closed(tokenizer)
        special = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
        template = tokenizer.chat_template
        return cls(
            tokens,
            types,
            merges or [_NO_MERGE],
            _cut(declared["pre_tokenizer"], bool(model.get("ignore_merges"))) if merges else "gpt-2",
            {name: int(i) for name, i in special.items() if i is not None},
            begins,
            ends,
            template if isinstance(template, str) else (template or {}).get("default"),
        )

    def write(self, writer: gguf.GGUFWriter) -> None:
        """Into a file's header."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.cut)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        for name, number in self.special.items():
            getattr(writer, f"add_{name}_token_id")(number)
        writer.add_add_bos_token(self.begins)
        writer.add_add_eos_token(self.ends)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def _tokens(vocab: Mapping[str, int], added: Sequence[Mapping[str, Any]], rows: int) -> tuple[list[str], list[int]]:
    """(the token of each row, its type); rows without a token get names that no text has."""
    tokens = [f"[PAD{i}]" for i in range(rows)]
    types = [int(gguf.TokenType.UNUSED)] * rows
    for token, number in vocab.items():
        tokens[number], types[number] = token, int(gguf.TokenType.NORMAL)
    for extra in added:
        if extra["lstrip"] or extra["rstrip"] or extra["single_word"]:
            raise _not_known(f"its token {extra['content']!r} takes spaces around it away")
        kind = gguf.TokenType.CONTROL if extra["special"] else gguf.TokenType.USER_DEFINED
        tokens[extra["id"]], types[extra["id"]] = extra["content"], int(kind)
    return tokens, types


def _cut(declared: Mapping[str, Any] | None, whole_pieces: bool) -> str:
    """llama.cpp's name for a `pre_tokenizer` of tokenizer.json."""
    steps = [] if declared is None else declared.get("pretokenizers", [declared])
    described = tuple(_step(step) for step in steps)
    name, takes_whole = CUTS.get(described, ("", False))
    if not name or takes_whole != whole_pieces:
        raise _not_known(f"it cuts texts in a way of its own ({', '.join(described) or 'not at all'})")
    return name


def _step(step: Mapping[str, Any]) -> str:
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use}:
            return "words" if use else "bytes"
        case {"type": "Digits", "individual_digits": True}:
            return "digits"
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            return str(pattern)
    return str(step["type"])


def _closed(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether a text gets the bos in front of it, and the eos behind it."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = tokenizer("a")["input_ids"]
    for begins in (False, True):
        for ends in (False, True):
            if ids == [tokenizer.bos_token_id] * begins + bare + [tokenizer.eos_token_id] * ends:
                return begins, ends
    raise _not_known("it puts more around a text than its bos and eos tokens")


def _not_known(why: str) -> UserError:
    return UserError(
        f"this model's tokenizer cannot be written as GGUF: {why}; supported is byte-level BPE as "
        f"{', '.join(name for name, _ in CUTS.values())} have it: use --format merged, and llama.cpp's own converter"
    )

"""Turn an example into a prompt: one place for training and for every evaluation.

A prompt ends where the answer begins, and is tokenised by itself. So in a test the model gets, token for token, what it
was trained to answer. This file does not know how long a sequence may be or what is done with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from fedloom.data.corpus import Example

Style = Literal["chat", "alpaca", "plain"]


_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


_ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Template:
    """A template that writes prompts and answers as token ids.

    Attributes:
        tokenizer: the base model's own.
        style: chat (the model's chat template), alpaca, or plain (the bare text and a newline).
        system: the system message under chat; None leaves it to the model's template.
    """

    tokenizer: PreTrainedTokenizerBase
    style: Style
    system: str | None = None

    @classmethod
    def choose(cls, tokenizer: PreTrainedTokenizerBase, wanted: str, system: str | None = None) -> Template:
        """Build the recipe's template `wanted`; auto uses chat if the tokenizer has a chat template, else alpaca."""
        if wanted == "auto":
            wanted = "chat" if tokenizer.chat_template else "alpaca"
        if wanted == "chat" and not tokenizer.chat_template:
            from fedloom.common.errors import UserError

            raise UserError("data.template=chat but this model's tokenizer has no chat template: use alpaca or plain")
        return cls(tokenizer, wanted, system)  # type: ignore[arg-type]

    @property
    def name(self) -> str:
        """The template's id in the key of the tokenised cache."""
        text = self.tokenizer.chat_template if self.style == "chat" else ""
        return f"{self.style}/{self.system!r}/{text}"

    def prompt_text(self, example: Example, shots: Sequence[Example] = ()) -> str:
        """Return the text that the model reads before its answer.

        Args:
            example: the question.
            shots: answered examples before it: earlier turns under chat, one after another elsewhere.
        """
        if self.style == "chat":
            messages = [{"role": "system", "content": self.system}] if self.system is not None else []
            for shot in shots:
                messages.append({"role": "user", "content": _question(shot)})
                messages.append({"role": "assistant", "content": shot.output})
            messages.append({"role": "user", "content": _question(example)})
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        before = "".join(f"{self.prompt_text(shot)}{shot.output}\n\n" for shot in shots)
        if self.style == "alpaca":
            form = _ALPACA_WITH_INPUT if example.input else _ALPACA
            return before + form.format(instruction=example.instruction, input=example.input)
        return f"{before}{_question(example)}\n"

    def prompt_ids(self, example: Example) -> list[int]:
        """Return the prompt's token ids.

        A chat template writes its own special tokens; other styles get the tokenizer's.
        """
        ids = self.tokenizer(self.prompt_text(example), add_special_tokens=self.style != "chat")["input_ids"]
        eos = self.tokenizer.eos_token_id
        if self.style != "chat" and len(ids) > 1 and ids[-1] == eos and eos != self.tokenizer.bos_token_id:
            ids = ids[:-1]  # some tokenizers end every text with eos, but the answer is still to come
        return list(ids)

    def answer_ids(self, text: str) -> list[int]:
        """Return an answer's token ids, with the end-of-sequence token."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*ids, self.tokenizer.eos_token_id]


def _question(example: Example) -> str:
    return f"{example.instruction}\n\n{example.input}" if example.input else example.instruction

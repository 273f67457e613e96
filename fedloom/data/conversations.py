"""Read conversations in a cell: lists of {role, content} or {from, value}, the usual form of preference data and chats.

    prompt, conversations   all turns before the answer: the text of a single turn; several turns with their speakers
    chosen, rejected        an answer: the last turn's text, whether the cell is that turn, a list of it, or all turns

Other cells pass unchanged. This file does not know which column has which role.
"""

from __future__ import annotations

from typing import Any

from fedloom.data.files import Row

#: The keys of a turn: the speaker and the text.
KEYS = (("role", "content"), ("from", "value"))


NAMES = {"human": "User", "user": "User", "gpt": "Assistant", "assistant": "Assistant"}


#: Columns with the text before an answer.
PROMPTS = ("instruction", "question", "prompt", "query", "conversations")


def read_turns(value: Any) -> list[tuple[str, str]] | None:
    """Return (speaker, text) of each turn; None for a cell that is no conversation."""
    listed = [value] if isinstance(value, dict) else value
    if not isinstance(listed, list) or not listed:
        return None
    found = []
    for turn in listed:
        keys = next((k for k in KEYS if isinstance(turn, dict) and set(k) <= set(turn)), None)
        if keys is None or not all(isinstance(turn[k], str) for k in keys):
            return None
        found.append((turn[keys[0]], turn[keys[1]]))
    return found


def prompt_text(value: Any) -> Any:
    """Return the text before an answer.

    >>> prompt_text([{"role": "user", "content": "How many?"}])
    'How many?'
    """
    said = read_turns(value)
    if said is None:
        return value
    if len(said) == 1:
        return said[0][1]
    return "\n\n".join(text if who == "system" else f"{NAMES.get(who, who)}: {text}" for who, text in said)


def answer_text(value: Any) -> Any:
    """Return an answer's text.

    >>> answer_text([{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "Two."}])
    'Two.'
    """
    said = read_turns(value)
    return value if said is None else said[-1][1]


def add_prompt(row: Row) -> Row:
    """Return `row` with its prompt; reads the prompt from the answer's conversation if no other column has it."""
    said = read_turns(row.get("chosen"))
    if said is None or len(said) < 2 or any(name in row for name in PROMPTS):
        return row
    return {**row, "prompt": row["chosen"][:-1]}

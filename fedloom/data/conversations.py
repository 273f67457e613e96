"""Conversations in a cell: lists of {role, content} or {from, value}, as preference data and chats are often stored.

    prompt, conversations   all turns before the answer: one turn is its text; of several each is named in front
    chosen, rejected        an answer: the last turn's text, whether the cell is that turn, a list of it, or all turns

Other cells are passed through. This file does not know which column plays which role.
"""

from __future__ import annotations

from typing import Any

from fedloom.data.files import Row

#: The keys of a turn: who speaks, and what is said.
KEYS = (("role", "content"), ("from", "value"))


NAMES = {"human": "User", "user": "User", "gpt": "Assistant", "assistant": "Assistant"}


#: Columns that hold what comes before an answer.
PROMPTS = ("instruction", "question", "prompt", "query", "conversations")


def turns(value: Any) -> list[tuple[str, str]] | None:
    """(who, text) of each turn; None where a cell is no conversation."""
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
    """What comes before an answer, as one text.

    >>> prompt_text([{"role": "user", "content": "How many?"}])
    'How many?'
    """
    said = turns(value)
    if said is None:
        return value
    if len(said) == 1:
        return said[0][1]
    return "\n\n".join(text if who == "system" else f"{NAMES.get(who, who)}: {text}" for who, text in said)


def answer_text(value: Any) -> Any:
    """An answer's text.

    >>> answer_text([{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "Two."}])
    'Two.'
    """
    said = turns(value)
    return value if said is None else said[-1][1]


def with_prompt(row: Row) -> Row:
    """`row` with a prompt of its own, where only the answer's conversation holds it."""
    said = turns(row.get("chosen"))
    if said is None or len(said) < 2 or any(name in row for name in PROMPTS):
        return row
    return {**row, "prompt": row["chosen"][:-1]}

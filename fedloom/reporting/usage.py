"""How a result is loaded by those who have no fedloom, as Python for its model card. Tests run what is written here."""

from __future__ import annotations

import json
from pathlib import Path, PurePath

from fedloom.data.corpus import Example
from fedloom.data.prompts import Template
from fedloom.recipe.recipe import Recipe

_QUESTION = "Name three animals."


def usage(folder: Path, form: str, hub: str | None, recipe: Recipe) -> str:
    """A few lines of Python that load the result and ask it something, in the form that it was trained on.

    Args:
        folder: where the result lies.
        form: peft, merged or gguf.
        hub: the base model's id on the hub; None where it is a folder.
    """
    if form == "gguf":
        return _of_gguf(next(folder.glob("*.gguf")).name, recipe)
    if (folder / "base_delta.safetensors").is_file():
        return (
            "Weights of the base changed too, by what lies in `base_delta.safetensors`: peft alone would load another "
            "model. `fedloom export RUN --format merged` writes one that transformers loads, and `fedloom evaluate` takes "
            "the run as it is."
        )
    where = hub or PurePath(recipe.model.name).name
    lines = ["from peft import PeftModel"] if form == "peft" else []
    lines += ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    here = '"."  # this folder, or its id on the hub'
    if form == "peft":
        lines += [
            f'base = "{where}"' + ("" if hub else "  # the folder of the base model"),
            f"adapter = {here}",
            "tokenizer = AutoTokenizer.from_pretrained(base)",
            "model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)",
        ]
    else:
        lines += [
            f"model = {here}",
            "tokenizer = AutoTokenizer.from_pretrained(model)",
            "model = AutoModelForCausalLM.from_pretrained(model)",
        ]
    lines += _prompt(recipe)
    lines += [
        "made = model.generate(**asked, max_new_tokens=64, do_sample=False)",
        'print(tokenizer.decode(made[0, asked["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    return "```python\n" + "\n".join(lines) + "\n```"


def _messages(recipe: Recipe) -> str:
    system = [{"role": "system", "content": recipe.data.system}] if recipe.data.system is not None else []
    return json.dumps([*system, {"role": "user", "content": _QUESTION}], ensure_ascii=False)


def _plain_prompt(recipe: Recipe) -> str | None:
    """The text that the model was trained to answer; None where the tokenizer's chat template writes it."""
    if recipe.data.template == "chat":
        return None
    return Template(None, recipe.data.template).prompt_text(Example(_QUESTION, "", ""))  # type: ignore[arg-type]


def _prompt(recipe: Recipe) -> list[str]:
    text = _plain_prompt(recipe)
    if text is not None:
        return [
            f"prompt = {json.dumps(text)}  # the form that it was trained on",
            'asked = tokenizer(prompt, return_tensors="pt")',
        ]
    return [
        f"messages = {_messages(recipe)}",
        "asked = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
        ")",
    ]


def _of_gguf(file: str, recipe: Recipe) -> str:
    text = _plain_prompt(recipe)
    if text is None:
        body = f'{{"messages": {_messages(recipe)}, "max_tokens": 64, "temperature": 0}}'
        asked = f"answer = server.handle_chat_completions({body})"
        said = 'print(answer["choices"][0]["message"]["content"])'
    else:
        asked = (
            f'answer = server.handle_completions({{"prompt": {json.dumps(text)}, "max_tokens": 64, "temperature": 0}})'
        )
        said = 'print(answer["choices"][0]["text"])'
    return (
        f"Whatever is built on llama.cpp loads `{file}`. From Python (`pip install xllamacpp`):\n\n```python\n"
        "import xllamacpp\n\n"
        f'params = xllamacpp.CommonParams()\nparams.model.path = "{file}"\n'
        f"server = xllamacpp.Server(params)\n{asked}\n{said}\n```"
    )

"""Write the model card's Python code that loads a result without fedloom. Tests run this code."""

from __future__ import annotations

import json
from pathlib import Path, PurePath

from fedloom.data.corpus import Example
from fedloom.data.prompts import Template
from fedloom.recipe.recipe import Recipe

_QUESTION = "Name three animals."


def usage(folder: Path, form: str, hub: str | None, recipe: Recipe) -> str:
    """Return a few lines of Python that load the result and generate an answer, with the prompt format of training.

    Args:
        folder: of the result.
        form: peft, merged or gguf.
        hub: the base model's id on the hub; None where it is a folder.
    """
    if form == "gguf":
        return _of_gguf(next(folder.glob("*.gguf")).name, recipe)
    if (folder / "base_delta.safetensors").is_file():
        return (
            "Training changed weights of the base too; `base_delta.safetensors` has the changes. Therefore "
            "peft alone would load another model. `fedloom export RUN --format merged` writes a model that transformers "
            "loads, and `fedloom evaluate` evaluates the run as it is."
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
        "output = model.generate(**inputs, max_new_tokens=64, do_sample=False)",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    return "```python\n" + "\n".join(lines) + "\n```"


def _messages(recipe: Recipe) -> str:
    system = [{"role": "system", "content": recipe.data.system}] if recipe.data.system is not None else []
    return json.dumps([*system, {"role": "user", "content": _QUESTION}], ensure_ascii=False)


def _plain_prompt(recipe: Recipe) -> str | None:
    """Return the prompt's text in the format of training; None where the tokenizer's chat template writes it."""
    if recipe.data.template == "chat":
        return None
    return Template(None, recipe.data.template).prompt_text(Example(_QUESTION, "", ""))  # type: ignore[arg-type]


def _prompt(recipe: Recipe) -> list[str]:
    text = _plain_prompt(recipe)
    if text is not None:
        return [
            f"prompt = {json.dumps(text)}  # the prompt format of training",
            'inputs = tokenizer(prompt, return_tensors="pt")',
        ]
    return [
        f"messages = {_messages(recipe)}",
        "inputs = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
        ")",
    ]


def _of_gguf(file: str, recipe: Recipe) -> str:
    text = _plain_prompt(recipe)
    if text is None:
        body = f'{{"messages": {_messages(recipe)}, "max_tokens": 64, "temperature": 0}}'
        request = f"answer = server.handle_chat_completions({body})"
        show = 'print(answer["choices"][0]["message"]["content"])'
    else:
        request = (
            f'answer = server.handle_completions({{"prompt": {json.dumps(text)}, "max_tokens": 64, "temperature": 0}})'
        )
        show = 'print(answer["choices"][0]["text"])'
    return (
        f"Every program that uses llama.cpp loads `{file}`. From Python (`pip install xllamacpp`):\n\n```python\n"
        "import xllamacpp\n\n"
        f'params = xllamacpp.CommonParams()\nparams.model.path = "{file}"\n'
        f"server = xllamacpp.Server(params)\n{request}\n{show}\n```"
    )

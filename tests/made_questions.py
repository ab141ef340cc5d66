"""Questions of a small world, as rows of each form, and a tiny GPT-2 that can be asked them."""

import json
import random
from pathlib import Path

import torch
from conftest import tiny_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

THINGS = [
    "an electron",
    "a photon",
    "a proton",
    "a qubit",
    "a gate",
    "a field",
    "a wave",
    "a mirror",
    "a crystal",
    "a mode",
]
QUALITIES = ["charge", "spin", "mass", "phase", "energy", "parity"]
CHOICES = ["zero", "one half", "one", "it depends on the frame", "minus one"]
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def multiple_choice(count: int, seed: int = 0) -> list[dict]:
    """So many questions with two to four choices each, shaped as QuantumBench's."""
    generator, rows = random.Random(seed), []
    for number in range(count):
        choices = generator.sample(CHOICES, generator.randint(2, 4))
        question = (
            f"What is the {generator.choice(QUALITIES)} of {generator.choice(THINGS)} in case {number}?"
        )
        rows.append({"question": question, "choices": choices, "answer": generator.randrange(len(choices))})
    return rows


def pairs(count: int) -> list[dict]:
    return [
        {"prompt": row["question"], "response": row["choices"][row["answer"]]}
        for row in multiple_choice(count)
    ]


def conversations(count: int) -> list[dict]:
    """Two questions and two answers each, the first after a system's word."""
    asked = [{"role": "system", "content": "Answer briefly."}]
    made = pairs(2 * count)
    return [
        {
            "messages": asked
            + [
                {"role": role, "content": row[column]}
                for row in made[2 * n : 2 * n + 2]
                for role, column in (("user", "prompt"), ("assistant", "response"))
            ]
        }
        for n in range(count)
    ]


def written(rows: list[dict], path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def question_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """Trained on these questions; with the tokens of a chat template where there is one."""
    texts = [
        f"Question: {row['question']}\nAnswer: {' '.join(row['choices'])}" for row in multiple_choice(200)
    ]
    tokenizer = tiny_tokenizer(texts)
    if template:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tokenizer.chat_template = template
    return tokenizer


def tiny_gpt2(folder: Path, *, layers: int, width: int, seed: int) -> Path:
    """A folder of the form that the hub's gpt2 has, of a few thousand weights."""
    torch.manual_seed(seed)
    tokenizer = question_tokenizer()
    GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=128,
            n_embd=width,
            n_layer=layers,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
            initializer_range=0.3,
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

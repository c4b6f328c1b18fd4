"""lm-evaluation-harness's local-completions on tasks that are files beside nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import requests
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

from .conftest import Server

QUESTIONS = [
    {"question": "the quick brown fox jumps over", "choices": [" the dog", " the moon"], "gold": 0},
    {"question": "def add(first, second):", "choices": [" return first", " print item"], "gold": 0},
    {"question": "größer ist", "choices": [" naïve", " 日本語", " 🙂"], "gold": 1},
]
CHOICE = {
    "task": "choose",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{gold}}",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
GENERATE = {
    "task": "write",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{choices[0]}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "temperature": 0},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.mark.parametrize(("tokenized", "batch"), [(True, 1), (True, 4), (False, 1)])
def test_loglikelihoods_are_the_sums_of_the_logprobs(
    server: Server, tmp_path: Path, tokenized: bool, batch: int
) -> None:
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    local = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
    for task in (CHOICE, GENERATE):
        text = json.dumps(task | local | {"test_split": "test"})  # JSON is YAML
        (tmp_path / f"{task['task']}.yaml").write_text(text)
    results: Any = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": "tiny",
            "base_url": server.url + "/completions",
            "tokenizer_backend": "huggingface",
            "tokenizer": str(server.folder),
            "tokenized_requests": tokenized,
            "max_retries": 1,
            "num_concurrent": 1 if batch > 1 else 2,
        },
        batch_size=batch,
        tasks=["choose", "write"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    assert 0 <= results["results"]["choose"]["acc,none"] <= 1
    assert len(results["samples"]["write"]) == len(QUESTIONS)
    tokenizer = AutoTokenizer.from_pretrained(server.folder)
    for sample in results["samples"]["choose"]:
        for (found, _), choice in zip(
            sample["filtered_resps"], sample["doc"]["choices"], strict=True
        ):
            question = sample["doc"]["question"]
            assert found == pytest.approx(_own_sum(server, tokenizer, question, choice), abs=0.2)


def _own_sum(server: Server, tokenizer: Any, question: str, choice: str) -> float:
    ids = tokenizer.encode(question + choice, add_special_tokens=False)
    context = len(tokenizer.encode(question, add_special_tokens=False))
    body = {"model": "tiny", "prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 0}
    answer = requests.post(server.url + "/completions", json=body, timeout=60).json()
    return float(sum(answer["choices"][0]["logprobs"]["token_logprobs"][context:]))

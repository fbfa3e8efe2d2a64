"""lm-evaluation-harness against the served demo model: what its own transformers backend finds, sample for sample."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from served import Served

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

CHOICES = [
    ("The capital of France is", ["Paris", "Berlin", "a banana"], 0),
    ("Water freezes at zero degrees", ["Celsius", "elephants"], 0),
    ("Two plus two equals", ["seven", "four", "blue"], 1),
    ("The opposite of hot is", ["cold", "window", "Tuesday"], 0),
]
QUESTIONS = [("The capital of France is", "Paris"), ("The first month of the year is", "January")]
MULTIPLE_CHOICE = """
task: some_choices
dataset_path: json
dataset_kwargs: {data_files: {test: CHOICES}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc}]
"""
GENERATION = """
task: some_questions
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n", "."], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A task of either kind over questions of our own: the harness's own ones come from the network."""
    from lm_eval.tasks import TaskManager

    directory = tmp_path_factory.mktemp("tasks")
    choices, questions = directory / "choices.jsonl", directory / "questions.jsonl"
    rows = [{"question": question, "choices": options, "label": label} for question, options, label in CHOICES]
    choices.write_text("\n".join(map(json.dumps, rows)))
    questions.write_text("\n".join(json.dumps({"question": q, "answer": a}) for q, a in QUESTIONS))
    (directory / "choices.yaml").write_text(MULTIPLE_CHOICE.replace("CHOICES", str(choices)))
    (directory / "questions.yaml").write_text(GENERATION.replace("QUESTIONS", str(questions)))
    return TaskManager(include_path=str(directory), include_defaults=False)


def evaluate(tasks: Any, model: str, arguments: dict[str, Any]) -> dict[str, Any]:
    names = ["some_choices", "some_questions"]
    return lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=names, task_manager=tasks, bootstrap_iters=0, log_samples=True
    )


def test_both_backends_find_the_same(
    served_demo: Served, demo_model: Path, tasks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    ours = evaluate(
        tasks,
        "local-completions",
        {
            "model": "demo",
            "base_url": f"{served_demo.url}/v1/completions",
            "tokenizer": str(demo_model),
            "num_concurrent": 4,
            "max_length": 512,
        },
    )
    theirs = evaluate(tasks, "hf", {"pretrained": str(demo_model), "dtype": "float32", "device": "cpu"})
    for name in ("some_choices", "some_questions"):
        for mine, other in zip(ours["samples"][name], theirs["samples"][name], strict=True):
            for one, two in zip(mine["filtered_resps"], other["filtered_resps"], strict=True):
                if name == "some_questions":
                    assert one == two
                else:
                    assert float(one[0]) == pytest.approx(float(two[0]), abs=2e-3)
                    assert str(one[1]) == str(two[1])
    assert ours["results"]["some_choices"]["acc,none"] == theirs["results"]["some_choices"]["acc,none"] >= 0.75

"""The fine-tuning example, in short: QLoRA's and LoRA's training with TRL and PEFT, and its adapter in moe_ray."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from random_mixtral import save_random_mixtral

from moe_ray import LLM, SamplingParams

pytest.importorskip("trl", reason="the extra finetune is not installed")

EXAMPLE = Path(__file__).parents[2] / "examples" / "finetune"
PYTHONPATH = str(EXAMPLE.parents[1])
MIXTRAL = EXAMPLE.parent / "mixtral-8x7b" / "config.json"
QUESTIONS = [f"What is {i} doubled?" for i in range(12)]
FLAGS = ("--max-steps", "4", "--held-out", "4", "--learning-rate", "0.01", "--device", "cpu")
pytestmark = pytest.mark.slow  # TRL alone takes seconds to import


@pytest.fixture(scope="module")
def train_script() -> Iterator[Any]:
    sys.path.insert(0, str(EXAMPLE))
    yield importlib.import_module("train")
    sys.path.remove(str(EXAMPLE))
    for name in ("train", "questions", "settings"):
        del sys.modules[name]


@pytest.fixture(scope="module")
def base(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_mixtral(
        tmp_path_factory.mktemp("to-be-tuned") / "model",
        seed=3,
        like=demo_model,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        initializer_range=0.15,
        bos_token_id=1,
        eos_token_id=2,
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "questions.jsonl"
    file.write_text("".join(json.dumps({"question": q, "answer": "It is twice as much."}) + "\n" for q in QUESTIONS))
    return file


def test_the_adapter_answers_in_moe_ray_as_in_peft(train_script: Any, base: Path, data: Path, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    train_script.main(["--model", str(base), "--data", str(data), "--output", str(tmp_path), *FLAGS])
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["loss_after"] < result["loss_before"] - 0.1
    held_out = [json.loads(line)["question"] for line in (tmp_path / "held_out.jsonl").read_text().splitlines()]
    assert len(held_out) == 4
    assert set(held_out) < set(QUESTIONS)

    tokenizer = AutoTokenizer.from_pretrained(base)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path)
    llm = LLM(base, dtype="float32", adapters={"tuned": tmp_path}, engine={"kv_cache_gib": 0.02})
    greedy = SamplingParams(max_tokens=12, temperature=0)
    for question in held_out:
        chat = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        expected = adapted.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12, pad_token_id=2)
        assert list(llm.chat(chat, greedy, adapter="tuned").token_ids) == expected[0, len(ids) :].tolist()
        assert llm.chat(chat, greedy).token_ids != llm.chat(chat, greedy, adapter="tuned").token_ids


def test_qlora_quantises_attention_and_experts(train_script: Any, base: Path, data: Path, tmp_path: Path) -> None:
    """transformers quantises attention alone; without the example's own step, experts would stay as they are."""
    from transformers import AutoModelForCausalLM

    wanted = train_script.parse("", ["--model", str(base), "--load-in-4bit", "--output", str(tmp_path), *FLAGS])
    setup = train_script.build(wanted, has_card=False)
    assert setup.training.activation_checkpointing
    plain = AutoModelForCausalLM.from_pretrained(base, quantization_config=setup.quantisation, device_map="cpu")
    by_transformers = train_script.weights_by_kind(plain)
    assert set(by_transformers["attention"]) == {"uint8"}
    assert set(by_transformers["experts"]) == {"float32"}
    train_script.main(["--model", str(base), "--data", str(data), "--load-in-4bit", "--output", str(tmp_path), *FLAGS])
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["loss_after"] < result["loss_before"] - 0.1
    assert set(result["weights_gib"]["experts"]) == {"uint8"}
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_mixtral_8x7b_is_set_up_for_one_card(train_script: Any) -> None:
    """Its script's own arguments, with the config.json that lies here in the place of the model."""
    script = EXAMPLE / "mixtral_8x7b.sh"
    done = subprocess.run(
        [str(script), "--dry-run", "--model", str(MIXTRAL)],
        capture_output=True,
        text=True,
        timeout=120,
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": PYTHONPATH},
    )
    shown = json.loads(done.stdout[: done.stdout.rindex("}") + 1])
    assert shown["BitsAndBytesConfig"]["bnb_4bit_quant_type"] == "nf4"
    assert shown["BitsAndBytesConfig"]["bnb_4bit_use_double_quant"]
    assert shown["BitsAndBytesConfig"]["bnb_4bit_compute_dtype"] == "bfloat16"
    assert shown["SFTConfig"]["optim"] == "paged_adamw_8bit"
    assert shown["SFTConfig"]["bf16"]
    assert shown["SFTConfig"]["activation_checkpointing"]
    assert shown["LoraConfig"]["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert "46.7 billion parameters, experts 96.6% of them" in done.stdout
    assert done.returncode == 1
    assert "--device cuda: there is no CUDA device here" in done.stderr
    assert "--optim paged_adamw_8bit: " in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--held-out", "12"], "--held-out 12: must be 1 to 11, of 12 questions"),
        (["--rank", "0"], "`r` should be a positive integer"),
        (["--model", "no-such-model"], "neither a directory"),
        (["--data", "/nowhere.jsonl"], "--data /nowhere.jsonl: No such file"),
    ],
)
def test_what_cannot_work_is_refused(
    arguments: list[str], says: str, train_script: Any, base: Path, data: Path, tmp_path: Path
) -> None:
    flags = ["--model", str(base), "--data", str(data), "--output", str(tmp_path), *FLAGS, *arguments]
    with pytest.raises(SystemExit, match="cannot train: ") as refused:
        train_script.main(flags)
    assert says in str(refused.value)


def test_a_line_that_is_no_question_is_named(train_script: Any, tmp_path: Path) -> None:
    file = tmp_path / "wrong.jsonl"
    file.write_text('{"question": "Why?", "answer": "So."}\n{"question": "Why?"}\n')
    with pytest.raises(train_script.CannotTrain, match="line 2: not an object"):
        train_script.read_questions(file)


def test_the_questions_are_many_and_each_answer_comes_once(train_script: Any) -> None:
    rows = train_script.read_questions(None)
    assert len(rows) > 2000
    assert len({row["answer"] for row in rows}) == len(rows)
    assert {"question": "What does `abs` do in Python?", "answer": "Return the absolute value of the argument."} in rows


@pytest.mark.parametrize("script", ["train.py", "ask.py"])
def test_help_says_how_to_run_it(script: str) -> None:
    done = subprocess.run([sys.executable, str(EXAMPLE / script), "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"`python examples/finetune/{script}`" in done.stdout

"""Fine-tune a Mixtral with LoRA (TRL and PEFT), or QLoRA, and save an adapter that moe_ray serves.

Run `python examples/finetune/train.py`. It builds the demo model on first use, teaches its attention to answer as
Python's docstrings do, and prints the loss on held-out questions before and after. `--model` takes a directory or a
Hugging Face repo id, `--data` your own questions; `--dry-run` checks arguments and machine, and trains nothing.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from questions import CannotTrain, conversations, read_questions, split
from settings import GIB, Setup, build, describe, kind_of, obstacles, parse

from moe_ray.config import load_config
from moe_ray.errors import MoeRayError
from moe_ray.hub import resolve_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(wanted: argparse.Namespace, setup: Setup) -> tuple[PreTrainedModel, Any]:
    """The frozen model on its device, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = resolve_model(load_config({"model": {"path": wanted.model}}))
    tokenizer = AutoTokenizer.from_pretrained(path)
    if not tokenizer.chat_template:
        raise CannotTrain(f"{path}: no chat template, which turns questions and answers into conversations")
    if setup.quantisation is None:
        return AutoModelForCausalLM.from_pretrained(path, dtype=setup.dtype), tokenizer
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=setup.dtype, quantization_config=setup.quantisation, device_map={"": "cpu"}
    )
    quantise_experts(model, setup)
    if setup.device == "cuda":
        model.to(setup.device)
        model.hf_device_map = {"": torch.cuda.current_device()}
    return model, tokenizer


def quantise_experts(model: PreTrainedModel, setup: Setup) -> None:
    """Quantise experts to NF4, layer by layer on the device that trains.

    transformers 5 keeps all experts of a layer in one parameter, and `BitsAndBytesConfig` quantises `nn.Linear` only:
    by itself it would leave 97 % of Mixtral-8x7B in 16 bits.
    """
    from bitsandbytes.nn.parametrize import replace_parameter_4bit
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    assert setup.quantisation is not None
    for module in model.modules():
        if isinstance(module, MixtralExperts):
            module.to(setup.device)
            for name in ("gate_up_proj", "down_proj"):
                replace_parameter_4bit(module, name, compress_statistics=True, quant_type="nf4")


def weights_by_kind(model: PreTrainedModel) -> dict[str, dict[str, float]]:
    """Stored GiB of attention, experts and all else, by dtype. uint8 holds two 4-bit weights a byte."""
    kinds: dict[str, dict[str, float]] = {}
    for name, parameter in model.named_parameters():
        size = parameter.numel() * parameter.element_size() / GIB
        dtypes = kinds.setdefault(kind_of(name), {})
        dtype = str(parameter.dtype).removeprefix("torch.")
        dtypes[dtype] = round(dtypes.get(dtype, 0.0) + size, 4)
    return kinds


def train(wanted: argparse.Namespace, setup: Setup) -> dict[str, Any]:
    """Train, save the adapter, and return what was measured."""
    import torch
    from trl import SFTTrainer

    learned, held_out = split(read_questions(wanted.data), wanted.held_out, wanted.seed)
    learned = learned[: wanted.max_steps * wanted.batch_size * wanted.gradient_accumulation]  # all that steps come to
    model, tokenizer = load(wanted, setup)
    weights = weights_by_kind(model)
    print(f"{wanted.model} on {setup.device}; GiB of weights: {json.dumps(weights)}")
    trainer = SFTTrainer(
        model=model,
        args=setup.training,
        train_dataset=conversations(learned),
        eval_dataset=conversations(held_out),
        processing_class=tokenizer,
        peft_config=setup.lora,
    )
    trained, total = trainer.model.get_nb_trainable_parameters()
    print(f"the adapter has {trained:,} parameters, {trained / total:.2%} of all")
    before = trainer.evaluate()["eval_loss"]
    print(f"loss on {len(held_out)} held-out answers before: {before:.4f}")
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    (wanted.output / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    peak = torch.cuda.max_memory_allocated() if setup.device == "cuda" else 0
    return {
        "loss_before": round(before, 4),
        "loss_after": round(after, 4),
        "steps": wanted.max_steps,
        "training_seconds": round(seconds, 1),
        "conversations": len(learned),
        "adapter_parameters": trained,
        "weights_gib": weights,
        "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB, 2),
        "peak_card_gib": round(peak / GIB, 2),
        "arguments": {name: str(value) for name, value in vars(wanted).items()},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    wanted = parse(__doc__ or "", arguments)
    try:
        import torch
        import trl  # noqa: F401
    except ImportError as error:
        sys.exit(f"{error}: pip install -e '.[finetune]'")
    has_card = torch.cuda.is_available()
    try:
        setup = build(wanted, has_card)
        if wanted.dry_run:
            describe(wanted, setup)
        in_the_way = obstacles(wanted, setup.device, has_card)
        if in_the_way:
            raise CannotTrain("\n".join(in_the_way))
        if wanted.dry_run:
            return
        result = train(wanted, setup)
    except (CannotTrain, MoeRayError, ValueError) as error:
        sys.exit(f"cannot train: {error}")
    (wanted.output / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"loss before {result['loss_before']}, after {result['loss_after']}: see {wanted.output}/result.json")
    print(f"serve it: moe-ray serve --model {wanted.model} --adapter python={wanted.output}")


if __name__ == "__main__":
    main()

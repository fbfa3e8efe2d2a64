"""Arguments, and what they become: the settings of transformers, PEFT and TRL, and what stands in their way here."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from moe_ray.config import load_config
from moe_ray.hub import resolve_config

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig
    from trl import SFTConfig

ATTENTION: Final = ("q_proj", "k_proj", "v_proj", "o_proj")
GIB: Final = 2**30
NF4_BITS: Final = 4 + 8 / 64 + 32 / (64 * 256)
"""Of a weight: 4, a scale of 8 bits for 64 weights, one of 32 bits for 256 such scales (Dettmers et al. 2023)."""
SHOWN_OF_LORA: Final = ("task_type", "r", "lora_alpha", "lora_dropout", "target_modules", "bias")
SHOWN_OF_TRAINING: Final = [
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "activation_checkpointing",
    "max_length",
    "learning_rate",
    "warmup_steps",
    "optim",
    "bf16",
    "use_cpu",
    "router_aux_loss_coef",
    "seed",
]


@dataclass(frozen=True)
class Setup:
    """Every object that decides how training runs."""

    device: str
    dtype: torch.dtype
    quantisation: BitsAndBytesConfig | None
    lora: LoraConfig
    training: SFTConfig


def parse(description: str, arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="demo", help="`demo` (default), a directory, or a Hugging Face repo id")
    add("--output", type=Path, default=Path("python-adapter"), help="directory of the adapter (python-adapter)")
    add("--data", type=Path, help='JSON lines {"question": ..., "answer": ...}; default: docstrings of this Python')
    add("--held-out", type=int, default=24, metavar="N", help="questions that only the loss is measured on (24)")
    add("--max-steps", type=int, default=20, metavar="N", help="optimizer steps (20)")
    add("--batch-size", type=int, default=4, metavar="N", help="conversations of a forward pass (4)")
    add("--gradient-accumulation", type=int, default=1, metavar="N", help="forward passes of a step (1)")
    add("--max-length", type=int, default=128, metavar="TOKENS", help="longer conversations are cut (128)")
    add("--learning-rate", type=float, default=2e-3, metavar="RATE", help="peak, then linear to 0 (2e-3)")
    add("--rank", type=int, default=16, help="of the adapter's matrices (16)")
    add("--alpha", type=int, default=32, help="the adapter's output is scaled by alpha / rank (32)")
    add("--dropout", type=float, default=0.0, help="of the adapter's input (0)")
    add("--load-in-4bit", action="store_true", help="QLoRA: frozen weights in NF4 (bitsandbytes), experts included")
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="auto: bfloat16 on a card, else float32",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a card where there is one")
    add("--optim", choices=("adamw_torch", "paged_adamw_8bit"), default="adamw_torch", help="the latter needs a card")
    add(
        "--gradient-checkpointing",
        action="store_true",
        help="compute activations twice, keep none; always so in 4 bits",
    )
    add("--seed", type=int, default=0, help="of the adapter's start and of the order of conversations (0)")
    add("--dry-run", action="store_true", help="build and print every setting, say what stands in the way, stop")
    return parser.parse_args(arguments)


def build(wanted: argparse.Namespace, has_card: bool) -> Setup:
    """All settings as the libraries' own objects; they check their values (`ValueError`)."""
    import torch
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig
    from trl import SFTConfig

    device = wanted.device if wanted.device != "auto" else "cuda" if has_card else "cpu"
    dtype_name = wanted.dtype if wanted.dtype != "auto" else "bfloat16" if device == "cuda" else "float32"
    dtype: torch.dtype = getattr(torch, dtype_name)
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=wanted.rank,
        lora_alpha=wanted.alpha,
        lora_dropout=wanted.dropout,
        target_modules=list(ATTENTION),
    )
    training = SFTConfig(
        output_dir=str(wanted.output),
        max_steps=wanted.max_steps,
        per_device_train_batch_size=wanted.batch_size,
        per_device_eval_batch_size=wanted.batch_size,
        gradient_accumulation_steps=wanted.gradient_accumulation,
        # Else the backward pass would find the unpacked experts of all layers in memory, which is what 4 bits avoid.
        activation_checkpointing=wanted.gradient_checkpointing or wanted.load_in_4bit,
        max_length=wanted.max_length,
        learning_rate=wanted.learning_rate,
        warmup_steps=min(10, wanted.max_steps // 10),
        optim=wanted.optim,
        bf16=dtype == torch.bfloat16,
        use_cpu=device == "cpu" or not has_card,
        router_aux_loss_coef=0.0,  # routers are frozen; and so the loss is the text's alone
        logging_steps=max(1, wanted.max_steps // 10),
        save_strategy="no",  # the adapter is saved at the end
        report_to="none",
        seed=wanted.seed,
    )
    return Setup(device, dtype, quantisation if wanted.load_in_4bit else None, lora, training)


def obstacles(wanted: argparse.Namespace, device: str, has_card: bool) -> list[str]:
    """Why training cannot run on this machine; empty when it can."""
    found = []
    if device == "cuda" and not has_card:
        found.append("--device cuda: there is no CUDA device here; --device cpu trains small models")
    if wanted.optim == "paged_adamw_8bit" and not has_card:
        found.append("--optim paged_adamw_8bit: its states live in CUDA's managed memory; --optim adamw_torch does not")
    return found


def model_size(name: str) -> dict[str, int]:
    """Parameters of experts, attention and all else, by the model's config.json alone."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    path = resolve_config(load_config({"model": {"path": name}}))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    sizes = dict.fromkeys(("experts", "attention", "other"), 0)
    for parameter_name, parameter in model.named_parameters():
        sizes[kind_of(parameter_name)] += parameter.numel()
    return sizes


def kind_of(parameter: str) -> str:
    """What a parameter belongs to, by its name."""
    return "experts" if ".experts." in parameter else "attention" if ".self_attn." in parameter else "other"


def describe(wanted: argparse.Namespace, setup: Setup) -> None:
    """Print every setting, and what the weights take."""
    settings = {
        "BitsAndBytesConfig": setup.quantisation.to_diff_dict() if setup.quantisation is not None else None,
        "LoraConfig": {name: value for name, value in asdict(setup.lora).items() if name in SHOWN_OF_LORA},
        "SFTConfig": {name: getattr(setup.training, name) for name in SHOWN_OF_TRAINING},
        "device": setup.device,
    }
    print(json.dumps(settings, indent=2, default=lambda value: sorted(value) if isinstance(value, set) else str(value)))
    sizes = model_size(wanted.model)
    total = sum(sizes.values())
    bits = setup.dtype.itemsize * 8
    print(f"{wanted.model}: {total / 1e9:.1f} billion parameters, experts {sizes['experts'] / total:.1%} of them")
    print(f"weights in {bits} bits: {total * bits / 8 / GIB:.1f} GiB")
    if setup.quantisation is not None:
        small = ((total - sizes["other"]) * NF4_BITS + sizes["other"] * bits) / 8 / GIB
        print(f"experts and attention in NF4: {small:.1f} GiB; while it loads, RAM holds those in {bits} bits")

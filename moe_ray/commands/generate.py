"""`moe-ray generate`: completes one prompt in this process, without Ray."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from moe_ray.commands.options import (
    Device,
    Dtype,
    HfOverrides,
    KvCacheDtype,
    LoadFormat,
    MaxModelLen,
    MaxTokens,
    Model,
    Quantize,
    QuantizeTrunk,
    Temperature,
    error_console,
)


def generate(
    prompt: Annotated[str, typer.Argument(help="Text to complete, or `-` for standard input.")],
    model: Model = "demo",
    chat: Annotated[bool, typer.Option("--chat", help="Send the prompt through the model's chat template.")] = False,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    top_p: Annotated[float, typer.Option()] = 1.0,
    seed: Annotated[int | None, typer.Option()] = None,
    dtype: Dtype = None,
    device: Device = None,
    quantize: Quantize = None,
    quantize_trunk: QuantizeTrunk = None,
    kv_cache_dtype: KvCacheDtype = None,
    max_model_len: MaxModelLen = None,
    hf_overrides: HfOverrides = None,
    load_format: LoadFormat = None,
) -> None:
    """Complete one prompt in this process, without Ray, streaming to standard output."""
    from moe_ray.commands.cache import with_usable_cache
    from moe_ray.config import load_config
    from moe_ray.console import loading_bars
    from moe_ray.core import SamplingParams
    from moe_ray.llm import LLM

    text = sys.stdin.read() if prompt == "-" else prompt
    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    with_usable_cache(load_config(), error_console())
    with loading_bars(error_console()) as progress:
        llm = LLM(
            model,
            dtype=dtype,
            device=device,
            quantize=quantize,
            quantize_trunk=quantize_trunk,
            kv_cache_dtype=kv_cache_dtype,
            max_model_len=max_model_len,
            hf_overrides=hf_overrides,
            load_format=load_format,
            progress=progress,
        )
    source: Any = llm.tokenizer.apply_chat_template([{"role": "user", "content": text}]) if chat else text
    for delta in llm.stream(source, sampling):
        print(delta, end="", flush=True)
    print()

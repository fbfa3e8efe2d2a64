"""Compiles Triton's kernels into DIR of `prebuild_triton.py DIR "80 90"`, for cards of these compute capabilities.

Without a card. They are those of a model of Mixtral-8x7B's shapes, or of `--config`, a config.json, in the forms of
`FORMS`; a process with TRITON_CACHE_DIR at DIR, or at a copy of it beside DIR, compiles what else it needs itself.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

from moe_ray.bench.gpu_shapes import SHAPES

FORMS: tuple[dict[str, str], ...] = ({}, {"quantize": "int4", "cache": "int8"}, {"quantize": "int8", "cache": "fp8"})
"""How trunk and experts are held, each with what is computed in bfloat16."""
OLDEST = 80
"""Older cards have no tensor cores for Triton, and torch computes there."""


def prebuild(capability: int, config: dict[str, Any]) -> str:
    """Compile for one capability; what was done, in words. TRITON_CACHE_DIR is set."""
    import torch

    from moe_ray.model.compute.triton.ahead import compile_ahead
    from moe_ray.model.compute.triton.model_launches import Held, expert_launches, trunk_launches
    from moe_ray.model.model_config import ModelConfig

    caches = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
    model, made, found = ModelConfig.from_dict(config), 0, 0
    for form in FORMS:
        held = Held(quantize=form.get("quantize"), cache=caches.get(form.get("cache", "")))
        compiled = compile_ahead([*trunk_launches(model, held), *expert_launches(model, held)], capability)
        made, found = made + compiled.made, found + compiled.found
    return f"compute capability {capability // 10}.{capability % 10}: {made} kernels compiled, {found} were there"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("capabilities", help='such as "80 90"; "": none')
    parser.add_argument("--config", type=Path)
    given = parser.parse_args()
    words = given.capabilities.split()
    if wrong := [word for word in words if not word.isdecimal() or int(word) < OLDEST]:
        sys.exit(f"error: not a compute capability from {OLDEST} on: {', '.join(wrong)} (8.6 is 86)")
    config = SHAPES["mixtral-8x7b"] if given.config is None else json.loads(given.config.read_text(encoding="utf-8"))
    given.directory.mkdir(parents=True, exist_ok=True)
    os.environ["TRITON_CACHE_DIR"] = str(given.directory.resolve())  # paths in the cache are whole
    os.environ.pop("TRITON_INTERPRET", None)
    with multiprocessing.get_context("spawn").Pool(min(len(words), os.cpu_count() or 1) or 1) as builders:
        for line in builders.starmap(prebuild, [(int(word), config) for word in words], chunksize=1):
            print(line)


if __name__ == "__main__":
    main()

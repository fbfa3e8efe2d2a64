"""Ends with an error where torch is not the build that the image wants: `check_torch.py cpu|cuda [INDEX]`.

pip takes PyPI's build, without a word, where an index has none of this version.
"""

from __future__ import annotations

import re
import sys


def complaint(variant: str, index: str, cuda: str | None) -> str:
    """What is wrong with a torch whose CUDA is `cuda` (None: it has none); "" where nothing is."""
    if variant == "cpu":
        return "" if cuda is None else f"this torch has CUDA {cuda}, the image is to have none"
    if cuda is None:
        return "this torch has no CUDA"
    named = re.search(r"/cu(\d+)(\d)/?$", index)
    if named and cuda != (wanted := ".".join(named.groups())):
        return f"this torch has CUDA {cuda}: {index} has none of this version for CUDA {wanted}"
    return ""


if __name__ == "__main__":
    import torch

    if wrong := complaint(sys.argv[1], "".join(sys.argv[2:]), torch.version.cuda):
        sys.exit(f"error: {wrong}")

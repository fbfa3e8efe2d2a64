"""Wait until a model directory is complete: its config.json, and every file of weights that its index names.

Environment: MODEL (a directory), WANTED (what the mark of the download Job must say; "" where there is no Job) and
TIMEOUT_S. Ends with status 1 and says what is missing when the time is over.
"""

import json
import os
import sys
import time
from pathlib import Path

MARK = ".moe-ray-complete"
LOOK_EVERY_S = 2.0
SAY_EVERY_S = 30.0


def missing(model: Path, wanted: str) -> str:
    """What is not there yet; "" where nothing is missing."""
    if not model.is_dir():
        return f"{model}: no such directory"
    mark = model / MARK
    if wanted and not mark.is_file():
        return f"{mark}: the download has not finished"
    if wanted and (found := mark.read_text().partition("\n")[0]) != wanted:
        return f"{model}: holds {found}, not {wanted}"
    if not (model / "config.json").is_file():
        return f"{model / 'config.json'}: not there"
    index = model / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        absent = [name for name in names if not (model / name).is_file()]
        return f"{model}: {len(absent)} of {len(names)} weight files missing, the first {absent[0]}" if absent else ""
    return "" if any(model.glob("*.safetensors")) else f"{model}: no *.safetensors"


def main() -> None:
    model, wanted = Path(os.environ["MODEL"]), os.environ.get("WANTED") or ""
    end, said = time.monotonic() + float(os.environ["TIMEOUT_S"]), float("-inf")
    while lacks := missing(model, wanted):
        if time.monotonic() > end:
            sys.exit(f"gave up: {lacks}")
        if time.monotonic() - said > SAY_EVERY_S:
            print(f"waiting: {lacks}", flush=True)
            said = time.monotonic()
        time.sleep(LOOK_EVERY_S)
    print(f"{model} is complete")


if __name__ == "__main__":
    main()

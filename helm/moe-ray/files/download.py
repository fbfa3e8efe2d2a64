"""Download a model from the Hugging Face Hub into a directory; what is there already is not fetched again.

Environment: REPO, REVISION ("" is the main branch), DIRECTORY, HF_TOKEN. The mark is written last: who waits for the
model knows by it that nothing is missing.
"""

import os
import threading
from pathlib import Path

from huggingface_hub import snapshot_download

from moe_ray.hub import WANTED

MARK = ".moe-ray-complete"
REPORT_S = 15.0


def size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def report(directory: Path, done: threading.Event) -> None:
    while not done.wait(REPORT_S):
        print(f"{size(directory) / 2**30:.2f} GiB on disk", flush=True)


def main() -> None:
    repo, revision = os.environ["REPO"], os.environ.get("REVISION") or None
    directory, wanted = Path(os.environ["DIRECTORY"]), f"{os.environ['REPO']}@{os.environ.get('REVISION') or 'main'}"
    mark = directory / MARK
    if mark.is_file() and mark.read_text() == wanted:
        print(f"{wanted} is in {directory} already")
        return
    directory.mkdir(parents=True, exist_ok=True)
    mark.unlink(missing_ok=True)
    print(f"downloading {wanted} to {directory}", flush=True)
    done = threading.Event()
    threading.Thread(target=report, args=(directory, done), daemon=True).start()
    snapshot_download(repo, revision=revision, local_dir=directory, allow_patterns=list(WANTED))
    done.set()
    mark.write_text(wanted)
    print(f"done: {size(directory) / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()

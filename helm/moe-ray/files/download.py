"""Download a model from the Hugging Face Hub into a directory, convert it where that is asked for, then write a mark.

Environment: REPO, REVISION ("" is the main branch), DIRECTORY (what the actors read), WANTED (what the mark says: who
waits for the model knows by it that this is the wanted one, complete), HF_TOKEN. CONVERT, such as `experts=8 top_k=2
noise=0.02 seed=0 dtype=bfloat16`: the download, a dense model, goes to SOURCE, and is upcycled to DIRECTORY.

What is there already is neither fetched nor converted again. A directory with the mark of another model is left alone.
"""

import contextlib
import glob
import os
import sys
import threading
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download

from moe_ray.model.foreign import INDEX, SINGLE, what_it_is
from moe_ray.model.repo_files import other_weight_files, small_files, weight_files

MARK = ".moe-ray-complete"
REPORT_S = float(os.environ.get("REPORT_S") or 15)
GIB = 2**30


def marked(directory: Path) -> str:
    """What the directory's mark says it holds; "" without a mark."""
    mark = directory / MARK
    return mark.read_text().partition("\n")[0] if mark.is_file() else ""


def on_disk(directory: Path, sizes: dict[str, int]) -> int:
    """Bytes of these files that are there, those of files under way with them."""
    under_way = (directory / ".cache" / "huggingface" / "download").rglob("*.incomplete")
    total = 0
    for path in [directory / name for name in sizes] + list(under_way):
        with contextlib.suppress(FileNotFoundError):  # one that is just being renamed
            total += path.stat().st_size
    return total


def report(directory: Path, sizes: dict[str, int], done: threading.Event) -> None:
    """A line now and then, until `done`."""
    whole = sum(sizes.values())
    while not done.wait(REPORT_S):
        have = min(on_disk(directory, sizes), whole)
        print(f"{have / GIB:.2f} of {whole / GIB:.2f} GiB ({have / max(whole, 1):.1%})", flush=True)


def fetch(repo: str, commit: str, directory: Path, names: list[str]) -> None:
    """These files and no others, where they are not there yet."""
    snapshot_download(repo, revision=commit, local_dir=directory, allow_patterns=[glob.escape(name) for name in names])


def download(repo: str, revision: str | None, directory: Path) -> str:
    """Fetch the files that serving needs; the commit that `revision` is now. Ends the process if one is not whole."""
    # This raises where the Hub cannot be asked; the client's download may then call a part of the files all of them.
    info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    commit = str(info.sha)
    every = {file.rfilename: file.size or 0 for file in info.siblings or []}
    small = small_files(every)
    directory.mkdir(parents=True, exist_ok=True)
    fetch(repo, commit, directory, small)
    weights = weight_files(directory)
    if weights == [SINGLE] and SINGLE not in every:
        weights = other_weight_files(every) or [SINGLE]
    if absent := [name for name in weights if name not in every] or ([] if weights else [INDEX]):
        sys.exit(f"{repo} at {commit}: has no {absent[0]}; {what_it_is(every, lambda name: {}) or 'it is not read'}")
    sizes = {name: every[name] for name in (*small, *weights)}
    print(f"downloading {repo} at {commit} to {directory}: {sum(sizes.values()) / GIB:.2f} GiB", flush=True)
    done = threading.Event()
    reporter = threading.Thread(target=report, args=(directory, sizes, done), daemon=True)
    reporter.start()
    try:
        fetch(repo, commit, directory, weights)
    finally:
        done.set()
        reporter.join()
    for name, size in sizes.items():
        path = directory / name
        if not path.is_file() or (size and path.stat().st_size != size):
            sys.exit(f"{path}: is not the file of {size} bytes that {repo} has at {commit}")
    return commit


def upcycle(source: Path, directory: Path, options: str) -> None:
    """What `moe-ray convert upcycle` does, with a line in the log for each layer."""
    from moe_ray.convert.recipe import UpcycleConfig
    from moe_ray.convert.upcycle import upcycle as run_upcycle

    given: dict[str, str] = dict(option.split("=", 1) for option in options.split())
    dtype: Any = given["dtype"]
    config = UpcycleConfig(
        num_experts=int(given["experts"]),
        top_k=int(given["top_k"]),
        noise=float(given["noise"]),
        seed=int(given["seed"]),
        dtype=dtype,
    )
    print(f"upcycling {source} to {directory}: {options}", flush=True)

    def say(stage: str, done: int, total: int) -> None:
        unit = " layers" if stage == "upcycle" else ""
        print(f"{stage}: {done} of {total}{unit}" if total else stage, flush=True)

    # Without a mark whatever is there is of a try that was cut short; the directory is replaced at once, by a rename.
    run_upcycle(source, directory, config, say, overwrite=True)


def main() -> None:
    repo, revision = os.environ["REPO"], os.environ.get("REVISION") or None
    directory, wanted, convert = Path(os.environ["DIRECTORY"]), os.environ["WANTED"], os.environ.get("CONVERT") or ""
    found = marked(directory)
    if found == wanted:
        print(f"{wanted} is in {directory} already")
        return
    if found:
        sys.exit(f"{directory} holds {found}, not {wanted}, and actors may read it: name another directory")
    target = Path(os.environ["SOURCE"]) if convert else directory
    commit = download(repo, revision, target)
    if convert:
        upcycle(target, directory, convert)
    (directory / MARK).write_text(f"{wanted}\n{commit}\n")
    print(f"done: {directory} holds {wanted}, commit {commit}")


if __name__ == "__main__":
    main()

"""The model on a volume: the Job that downloads it, and the container that waits for it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from fake_hub import MAIN, OTHER, WANTED, Hub, download, environment, script
from helm_rendering import CHART, Manifest, render


def test_waiting_for_the_model(tmp_path: Path) -> None:
    missing = script("wait_for_model").missing
    model = tmp_path / "mixtral"
    assert missing(model, "").endswith("no such directory")
    model.mkdir()
    assert "config.json: not there" in missing(model, "")
    (model / "config.json").write_text("{}")
    assert "no *.safetensors" in missing(model, "")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / "model-1.safetensors").touch()
    assert "1 of 2 weight files missing, the first model-2.safetensors" in missing(model, "")
    (model / "model-2.safetensors").touch()
    assert missing(model, "") == ""
    assert "the download has not finished" in missing(model, WANTED)
    mark = model / script("download").MARK
    assert mark.name == script("wait_for_model").MARK
    mark.write_text(f"owner/mixtral@v1\n{MAIN}\n")
    assert missing(model, WANTED).endswith("holds owner/mixtral@v1, not owner/mixtral@main")
    mark.write_text(f"{WANTED}\n{MAIN}\n")
    assert missing(model, WANTED) == ""


def test_waiting_ends_with_what_is_missing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, CHART / "files" / "wait_for_model.py"],
        env={"MODEL": str(tmp_path / "absent"), "TIMEOUT_S": "0"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 1
    assert "gave up: " in done.stderr
    assert "no such directory" in done.stderr


def test_downloading_a_model(hub: str, tmp_path: Path) -> None:
    directory = tmp_path / "mixtral"
    first = download(hub, tmp_path)
    assert first.returncode == 0, first.stderr
    assert f"downloading owner/mixtral at {MAIN} to {directory}: 0.00 GiB" in first.stdout
    assert (directory / "model.safetensors").read_bytes() == Hub.files["model.safetensors"]
    assert not (directory / "training.bin").exists()
    assert script("wait_for_model").missing(directory, WANTED) == ""
    Hub.asked.clear()
    second = download(hub, tmp_path)
    assert second.returncode == 0, second.stderr
    assert "already" in second.stdout
    assert Hub.asked == []


def test_only_what_is_read_comes_down(hub: str, tmp_path: Path) -> None:
    """The weights twice, copies in folders, other programs' files: what the index names is fetched, once."""
    shards = {"model-1-of-2.safetensors": b"one" * 999, "model-2-of-2.safetensors": b"two" * 999}
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    wanted = {
        "config.json": b"{}",
        "tokenizer.model": b"pieces",
        "chat_template.jinja": b"{{ messages }}",
        "model.safetensors.index.json": json.dumps(index).encode(),
        **shards,
    }
    Hub.files = {
        **wanted,
        "model.safetensors": b"all in one",
        "consolidated.safetensors": b"again" * 999,
        "model.fp16.safetensors": b"a variant",
        "original/consolidated-00001-of-00001.safetensors": b"again",
        "onnx/config.json": b"{}",
        "model.Q4_K_M.gguf": b"GGUF",
        "pytorch_model.bin": b"pickle",
    }
    done = download(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    fetched = {str(path.relative_to(tmp_path / "mixtral")) for path in (tmp_path / "mixtral").rglob("*")}
    assert {name for name in fetched if not name.startswith(".")} == set(wanted)
    assert {path.rpartition("/resolve/")[2].split("/", 1)[1] for path in Hub.asked if "/resolve/" in path} == set(
        wanted
    )


def test_mistrals_own_files_come_down(hub: str, tmp_path: Path) -> None:
    wanted = {"params.json": b"{}", "consolidated.safetensors": b"w" * 99, "tokenizer.model": b"pieces"}
    Hub.files = {**wanted, "consolidated.00.pth": b"pickle"}
    done = download(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    fetched = {str(path.relative_to(tmp_path / "mixtral")) for path in (tmp_path / "mixtral").rglob("*")}
    assert {name for name in fetched if not name.startswith(".")} == set(wanted)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"mixtral.Q4_K_M.gguf": b"GGUF"}, "a GGUF file"),
        ({"params.json": b"{}", "consolidated.00.pth": b"pickle"}, "Mistral's own layout as pickles"),
        ({"config.json": b"{}", "pytorch_model.bin": b"pickle"}, "pickle checkpoints"),
        ({"config.json": b"{}", "model.safetensors.index.json": b'{"weight_map": {}}'}, "model.safetensors.index.json"),
    ],
)
def test_a_repository_without_weights_for_us(hub: str, tmp_path: Path, files: dict[str, bytes], said: str) -> None:
    Hub.files = files
    done = download(hub, tmp_path)
    assert done.returncode != 0
    assert said in done.stderr
    assert not [path for path in Hub.asked if "/resolve/" in path and not path.endswith(".json")], "nothing large"


def test_a_revision_is_resolved_to_its_commit(hub: str, tmp_path: Path) -> None:
    done = download(hub, tmp_path, REVISION="v2", WANTED="owner/mixtral@v2")
    assert done.returncode == 0, done.stderr
    assert sum("/revision/v2" in path for path in Hub.asked) == 1, "asked again, a branch may have moved meanwhile"
    assert [path for path in Hub.asked if "/resolve/" in path]
    assert all(f"/resolve/{OTHER}/" in path for path in Hub.asked if "/resolve/" in path)
    assert (tmp_path / "mixtral" / script("download").MARK).read_text() == f"owner/mixtral@v2\n{OTHER}\n"


@pytest.mark.parametrize("broken", ["info", "tree"])
def test_half_a_download_is_not_taken_for_all_of_it(hub: str, tmp_path: Path, broken: str) -> None:
    """Where the Hub cannot be asked, the client is content with a directory that has anything in it."""
    directory = tmp_path / "mixtral"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    Hub.info_works, Hub.tree_works = broken != "info", broken != "tree"
    done = download(hub, tmp_path)
    assert done.returncode != 0
    assert not (directory / script("download").MARK).exists()
    assert script("wait_for_model").missing(directory, WANTED) != ""


def test_a_file_of_another_size_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("download")
    sizes = {"config.json": 2, "model.safetensors": 3}
    files = [type("File", (), {"rfilename": name, "size": size})() for name, size in sizes.items()]
    info = type("Info", (), {"sha": MAIN, "siblings": files})()
    monkeypatch.setattr(module, "HfApi", lambda: type("Api", (), {"model_info": lambda *_, **__: info})())
    monkeypatch.setattr(module, "snapshot_download", lambda *_, **__: None)
    with pytest.raises(SystemExit, match=r"config.json: is not the file of 2 bytes"):
        module.download("owner/mixtral", None, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"model.safetensors: is not the file of 3 bytes"):
        module.download("owner/mixtral", None, tmp_path)
    (tmp_path / "model.safetensors").write_text("abc")
    assert module.download("owner/mixtral", None, tmp_path) == MAIN


def test_another_models_directory_is_left_alone(hub: str, tmp_path: Path) -> None:
    directory = tmp_path / "mixtral"
    assert download(hub, tmp_path).returncode == 0
    before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    done = download(hub, tmp_path, REVISION="v2", WANTED="owner/mixtral@v2")
    assert done.returncode != 0
    assert "holds owner/mixtral@main, not owner/mixtral@v2" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == before


def test_the_log_says_how_far_it_is(hub: str, tmp_path: Path) -> None:
    Hub.files["model.safetensors"] = b"weights!" * 2**22  # 32 MiB
    Hub.slow = threading.Event()
    process = subprocess.Popen(
        [sys.executable, "-u", CHART / "files" / "download.py"],
        env=environment(hub, tmp_path, REPORT_S="0.2"),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    percents: list[float] = []
    for line in process.stdout:
        found = re.fullmatch(r"(\d+\.\d\d) of 0\.03 GiB \((\d+\.\d)%\)\n", line)
        if found:
            percents.append(float(found[2]))
        if percents and percents[-1] > 10:
            Hub.slow.set()
    assert process.wait(60) == 0
    assert any(10 < percent < 90 for percent in percents), percents


def test_the_job_and_the_waiting_pods_agree() -> None:
    download = {"enabled": True, "repo": "owner/mixtral", "revision": "abc"}
    rendered = render({"model": {"volume": {"enabled": True}, "download": download}})
    assert rendered.application["args"]["model"] == {"path": "/models/mixtral-abc", "served_name": "mixtral"}
    (container,) = rendered.one("Job")["spec"]["template"]["spec"]["containers"]
    env = {e["name"]: e["value"] for e in container["env"]}
    assert (env["REPO"], env["REVISION"], env["DIRECTORY"]) == ("owner/mixtral", "abc", "/models/mixtral-abc")
    assert {m["name"]: m.get("readOnly") for m in container["volumeMounts"]}["model"] is False
    for group in rendered.groups.values():
        *_, wait = group["template"]["spec"]["initContainers"]
        waits = {e["name"]: e["value"] for e in wait["env"]}
        assert waits["MODEL"] == env["DIRECTORY"]
        assert waits["WANTED"] == env["WANTED"] == "owner/mixtral@abc"
    without = render({"model": {"path": "/models/mixtral"}}).groups["headgroup"]
    assert {e["name"]: e["value"] for e in without["template"]["spec"]["initContainers"][-1]["env"]}["WANTED"] == ""


def directory(**download: object) -> str:
    download = {"enabled": True, "repo": "owner/llama", **download}
    args = render({"model": {"volume": {"enabled": True}, "download": download}}).application["args"]
    assert args["model"]["served_name"] == "llama"
    path: str = args["model"]["path"]
    return path


def test_every_model_has_a_directory_of_its_own() -> None:
    assert directory() == "/models/llama"
    upcycled: Manifest = {"convert": "upcycle"}
    seen = [
        directory(),
        directory(revision="v1"),
        directory(revision="refs/pr/1"),
        directory(revision="refs/pr/2"),
        directory(**upcycled),
        directory(**upcycled, revision="v1"),
        directory(**upcycled, upcycle={"topK": 1}),
        directory(**upcycled, upcycle={"seed": 1}),
    ]
    assert len(set(seen)) == len(seen)
    for path in seen:
        assert re.fullmatch(r"/models/[A-Za-z0-9._-]+", path)
    assert directory(revision="v1", directory="mine") == directory(**upcycled, directory="mine") == "/models/mine"

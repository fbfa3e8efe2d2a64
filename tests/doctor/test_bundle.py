"""`moe-ray support-bundle`: what is in it, and that no secret is, wherever one was planted."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest

from moe_ray.config import load_config
from moe_ray.doctor import bundle, ray_logs
from moe_ray.doctor.redaction import GONE, Redactor, secrets_in, without_secrets

RUN = "from moe_ray.commands.main import main; main()"
CONFIG = """
model: {served_name: harmless-name}
cluster_token: planted-cluster-token
gateway: {api_keys: [planted-key-one, "planted\\"quoted-key"], cors_origins: ["https://user:planted-origin@x.org"]}
"""
VARIABLES = {
    "HF_TOKEN": "hf_plantedplantedplanted",
    "OPENAI_API_KEY": "sk-planted-openai-key",
    "RAY_AUTH_TOKEN": "planted-ray-token",
    "MY_COMPANY_PASSWORD": "planted-password",
    "PGPASS": "planted-variable-that-is-not-sent",
    "https_proxy": "http://me:planted-proxy@127.0.0.1:9",
    "MOE_RAY_MODEL__REVISION": "harmless-revision",
}
LOG = """
INFO harmless line: max_tokens=2048, kv_cache_tokens: 123456, token id 9690
INFO keys planted-key-one and planted-cluster-token and planted"quoted-key and planted-password
{"headers": {"Authorization": "Bearer planted-bearer", "X-Api-Key": "planted-header"}}
GET https://user:planted-userinfo@example.org/x?access_token=planted-query&y=1
password = 'planted-assigned'; api_keys=["planted-listed", "planted-too"] SECRET: planted-yaml
hf_plantedfromlogs12 sk-plantedfromlogs12 AKIAPLANTED123456789 eyJplanted1234.planted12345.planted
-----BEGIN PRIVATE KEY-----
cGxhbnRlZAplanted+in/pem
-----END PRIVATE KEY-----
INFO the last harmless line
"""


def test_no_secret_is_in_it_and_nothing_has_to_run(tmp_path: Path) -> None:
    config, output, home = tmp_path / "config.yaml", tmp_path / "bundle.tar.gz", tmp_path / "home"
    config.write_text(CONFIG)
    (home / ".ray").mkdir(parents=True)
    (home / ".ray" / "auth_token").write_text("planted-token-file\n")
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:  # short enough for sockets
        logs = Path(directory) / "ray" / "session_2026-01-02_03-04-05_000006_7" / "logs"
        (logs / "serve").mkdir(parents=True)
        (logs / "serve" / "replica_moe-ray_Expert3_abc.log").write_text(LOG + "planted-token-file\n")
        (logs / "worker-1-2-3.err").write_text("first line\n" + "x" * 200_000 + "\nmiddle\n" + "y\n" * 40_000 + LOG)
        env = {
            **{name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")},
            **VARIABLES,
            "HOME": str(home),
            "RAY_TMPDIR": directory,
            "RAY_ADDRESS": "127.0.0.1:1",
            "HF_HUB_OFFLINE": "1",
        }
        command = ["support-bundle", "--config", str(config), "--output", str(output), "--log-mib", "0.1"]
        done = subprocess.run(
            [sys.executable, "-c", RUN, *command], capture_output=True, text=True, env=env, timeout=120, check=False
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(output)
    assert "not in it: cluster: no Ray cluster at 127.0.0.1:1" in done.stderr
    assert stat.S_IMODE(output.stat().st_mode) == 0o600
    with tarfile.open(output) as archive:
        texts = {each.name.partition("/")[2]: read(archive, each) for each in archive.getmembers()}
    everything = "\n".join([*texts, *texts.values()])
    assert "planted" not in everything.lower(), [line for line in everything.splitlines() if "planted" in line.lower()]
    session = f"logs/{logs.parent.name}"
    worker = texts[f"{session}/worker-1-2-3.err"]
    assert worker.startswith("[")
    assert "bytes left out" in worker.splitlines()[0]
    assert len(worker) < 0.11 * 2**20
    assert "first line" not in worker
    for text in (worker, texts[f"{session}/serve/replica_moe-ray_Expert3_abc.log"]):
        assert "max_tokens=2048, kv_cache_tokens: 123456, token id 9690" in text
        assert "INFO the last harmless line" in text
    shown = json.loads(texts["configuration.json"])
    assert shown["model"]["served_name"] == "harmless-name"
    assert shown["gateway"]["api_keys"] == [GONE, GONE]
    variables = json.loads(texts["environment.json"])
    assert variables["MOE_RAY_MODEL__REVISION"] == "harmless-revision"
    assert variables["HF_TOKEN"] == GONE
    assert "PGPASS" not in variables
    assert {each["check"] for each in json.loads(texts["doctor.json"])["findings"]} >= {"python", "ray address"}
    assert json.loads(texts["versions.json"])["packages"]["ray"]
    manifest = json.loads(texts["manifest.json"])
    assert set(manifest["files"]) | {"manifest.json"} == set(texts)
    assert "logs of other machines" in manifest["missing"]


def read(archive: tarfile.TarFile, entry: tarfile.TarInfo) -> str:
    file = archive.extractfile(entry)
    assert file is not None
    return file.read().decode()


@pytest.mark.parametrize(
    "harmless",
    [
        "max_tokens: 2048",
        "the token's id is 7",
        "http://127.0.0.1:8000/v1",
        "user@example.org wrote",
        "tokens/s",
        "KeyError: 'x'",
        "no API key provided",
    ],
)
def test_what_is_no_secret_stays(harmless: str) -> None:
    assert Redactor(["abc"])(harmless) == harmless


def test_secrets_of_trees() -> None:
    tree = {"api_keys": ["k1"], "tls": {"key": "/etc/key.pem"}, "port": "8000", "X_KEYS": '["j1", "j2"]'}
    assert list(secrets_in(tree)) == ["k1", "/etc/key.pem", '["j1", "j2"]', "j1", "j2"]
    assert without_secrets(tree) == {"api_keys": [GONE], "tls": {"key": GONE}, "port": "8000", "X_KEYS": GONE}
    shown = bundle.configuration(load_config({"cluster_token": "sekret", "gateway": {"api_keys": ["sekret"]}}))
    assert "sekret" not in str(shown)


def test_the_latest_sessions_and_the_ends_of_their_logs(tmp_path: Path) -> None:
    for number in range(4):
        logs = tmp_path / "ray" / f"session_2026-01-0{number + 1}" / "logs"
        logs.mkdir(parents=True)
        (logs / "raylet.out").write_text("one\ntwo\nthree\n")
        (logs / "raylet.err").touch()
        (logs / "other.log").write_text("not ours")
        os.utime(logs.parent, (number, number))
    found = ray_logs.session_logs([tmp_path, tmp_path / "none"])
    assert [path.parent.name for path in found] == ["session_2026-01-04", "session_2026-01-03"]
    (file,) = ray_logs.log_files(found[0])
    assert ray_logs.end_of(file, 100) == "one\ntwo\nthree\n"
    assert ray_logs.end_of(file, 8) == "[6 bytes left out]\nthree\n"


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        bundle.Bundle(Redactor([])).write(tmp_path / "none" / "bundle.tar.gz")

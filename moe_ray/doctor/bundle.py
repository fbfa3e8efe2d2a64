"""A support bundle: what is known of an installation, its Ray and its server, in one archive without secrets."""

from __future__ import annotations

import io
import json
import os
import platform
import re
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import yaml
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from moe_ray.config import Config, cluster_token
from moe_ray.deploy.cluster_state import ClusterState
from moe_ray.deploy.local_ray import reason
from moe_ray.deploy.places import FALLBACK, own_directory, ray_directory
from moe_ray.deploy.ray_internals import AUTH_TOKEN_PATH, DEFAULT_TOKEN_FILE
from moe_ray.doctor.finding import Finding, Subject
from moe_ray.doctor.ray_logs import end_of, log_files, session_logs
from moe_ray.doctor.redaction import Redactor, secrets_in, without_secrets
from moe_ray.errors import ConfigError, MoeRayError

PROXIES: Final = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
VARIABLES: Final = frozenset(
    {
        *("PATH", "HOME", "USER", "SHELL", "TERM", "LANG", "COLUMNS", "TMPDIR"),
        *("VIRTUAL_ENV", "CXX", "LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONPATH"),
        *PROXIES,
        *map(str.upper, PROXIES),
    }
)
"""Variables of the environment that are sent."""
VARIABLE_PREFIXES: Final = (
    "MOE_RAY_",
    "RAY_",
    "HF_",
    "CUDA_",
    "NVIDIA_",
    "OMP_",
    "MKL_",
    "TORCH_",
    "LC_",
    "XDG_",
    "GRPC_",
)
"""And those that begin so; of a name that says it is a secret, no value is sent."""
MOST_LOG_BYTES: Final = 64 * 2**20
"""Of all logs together, before they are compressed."""


class Bundle:
    """Files of an archive; every text loses its secrets as it is added."""

    def __init__(self, redact: Redactor) -> None:
        self._redact = redact
        self._files: dict[str, bytes] = {}
        self.missing: dict[str, str] = {}
        """What is not in it → why."""

    def add(self, name: str, text: str) -> None:
        """Add a file."""
        self._files[name] = self._redact(text).encode("utf-8", "replace")

    def add_json(self, name: str, value: Any) -> None:
        """Add a file of JSON; what JSON has no form for is written as text."""
        plain = without_secrets(json.loads(json.dumps(value, default=str)))
        self._files[name] = json.dumps(self._redact.in_tree(plain), indent=1).encode()

    def write(self, path: Path) -> None:
        """Write the archive at once, readable by this user alone, with a manifest."""
        self.add_json("manifest.json", {"files": sorted(self._files), "missing": self.missing})
        now = time.time()
        with tempfile.NamedTemporaryFile(dir=path.absolute().parent, delete=False) as file:  # mode 600
            try:
                with tarfile.open(fileobj=file, mode="w:gz") as archive:
                    for name, content in sorted(self._files.items()):
                        entry = tarfile.TarInfo(f"moe-ray-support/{name}")
                        entry.size, entry.mtime = len(content), now
                        archive.addfile(entry, io.BytesIO(content))
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise


def known_secrets(subject: Subject, file: Path | None) -> Iterator[str]:
    """Every secret that this user's configuration, environment and token files hold."""
    from huggingface_hub import get_token

    yield from secrets_in(subject.environ)
    yield from secrets_in(subject.config.model_dump(mode="json"))
    if file is not None:
        yield from secrets_in(_yaml(file))
    for path in _token_files(subject.environ):
        try:
            yield path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            continue
    derived = cluster_token(subject.config, ray_uses_tokens=True)
    yield from filter(None, (derived, get_token()))
    for name, value in subject.environ.items():
        if name.lower().endswith("_proxy") and (found := re.search(r"//[^/@]*:([^/]*)@", value)):
            yield found[1]


def add_installation(bundle: Bundle, subject: Subject, found: list[Finding]) -> None:
    """Add versions, configuration, environment and what the doctor says."""
    versions = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {each.metadata["Name"]: each.version for each in metadata.distributions()},
    }
    bundle.add_json("versions.json", versions)
    bundle.add_json("doctor.json", {"findings": [asdict(finding) for finding in found]})
    if subject.config_fault is None:
        bundle.add_json("configuration.json", configuration(subject.config))
    else:
        bundle.missing["configuration.json"] = subject.config_fault
    bundle.add_json("environment.json", variables(subject.environ))


def configuration(config: Config) -> Any:
    """The whole tree, without the values of secrets."""
    return without_secrets(config.model_dump(mode="json"))


def variables(environ: Mapping[str, str]) -> Any:
    """The variables that are sent, without the values of secrets."""
    shown = {name: environ[name] for name in sorted(environ) if name in VARIABLES or name.startswith(VARIABLE_PREFIXES)}
    return without_secrets(shown)


def add_cluster(bundle: Bundle, state: ClusterState, details: Mapping[str, Callable[[], Any]]) -> None:
    """Add a cluster's nodes and resources, and `details`: file → what makes it, which may raise `MoeRayError`."""
    folder = "cluster-" + re.sub(r"[^\w.-]", "_", state.address)
    bundle.add_json(f"{folder}/ray.json", asdict(state))
    if state.fault is not None:
        bundle.missing[folder] = state.fault
        return
    for name, make in details.items():
        try:
            bundle.add_json(f"{folder}/{name}", make())
        except (MoeRayError, RayError, RayServeException) as failure:
            bundle.missing[f"{folder}/{name}"] = reason(failure)


def add_logs(bundle: Bundle, environ: Mapping[str, str], most_bytes: int) -> None:
    """Add the ends of the logs that lie on this machine, each at most `most_bytes`."""
    try:
        places = dict.fromkeys((ray_directory(environ), FALLBACK))
    except ConfigError:
        places = dict.fromkeys((FALLBACK,))
    left, some = MOST_LOG_BYTES, False
    for logs in session_logs(places):
        for path in log_files(logs):
            name = f"logs/{logs.parent.name}/{path.relative_to(logs)}"
            if left <= 0:
                bundle.missing[name] = f"more than {MOST_LOG_BYTES:,} bytes of logs"
                continue
            try:
                text = end_of(path, min(most_bytes, left))
            except OSError as failure:
                bundle.missing[name] = str(failure)
                continue
            bundle.add(name, text)
            left, some = left - len(text), True
    if not some:
        bundle.missing["logs"] = f"no logs of Ray below {' or '.join(map(str, places))}"
    bundle.missing["logs of other machines"] = "run moe-ray support-bundle on each of them"


def _token_files(environ: Mapping[str, str]) -> Iterator[Path]:
    for name in (environ.get(AUTH_TOKEN_PATH), DEFAULT_TOKEN_FILE):
        if name:
            yield Path(os.path.expanduser(name))
    try:
        yield own_directory() / "ray_auth_token"
    except ConfigError:
        return


def _yaml(file: Path) -> Any:
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None

"""Says how far a deployed config file is, from what `serve status` prints: `serve status | deployed.py FILE [TIMES]`.

Prints `running`, `waiting` or `failed`, and below it why. TIMES is what `serve status | deployed.py --times` printed
before `serve deploy`: an application that still has the time of then is the old one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml


def times(status: Mapping[str, Any]) -> dict[str, float]:
    """When each application was deployed last."""
    found: Mapping[str, Any] = status.get("applications") or {}
    return {name: application["last_deployed_time_s"] for name, application in found.items()}


def progress(names: list[str], status: Mapping[str, Any], before: Mapping[str, float]) -> tuple[str, str]:
    """The state of the applications of these names, and why it is not `running` yet."""
    found: Mapping[str, Any] = status.get("applications") or {}
    waiting = ""
    for name in names:
        if (application := found.get(name)) is None or application["last_deployed_time_s"] == before.get(name):
            waiting = waiting or f"{name} is not taken up yet"
            continue
        state, deployments = application["status"], application.get("deployments") or {}
        late = {each: is_now for each, is_now in deployments.items() if is_now["status"] != "HEALTHY"}
        if state == "DEPLOY_FAILED":
            failed = [f"{each}: {is_now['message']}" for each, is_now in late.items() if is_now["message"]]
            return "failed", "\n".join([f"{name}: {application['message']}", *failed])
        if state != "RUNNING":
            say = next((f", {each}: {is_now['message']}" for each, is_now in late.items() if is_now["message"]), "")
            waiting = waiting or " ".join(f"{name} is {state}{say}".split())
    return ("waiting", waiting) if waiting else ("running", "")


if __name__ == "__main__":
    try:
        now = dict(yaml.safe_load(sys.stdin) or {})
    except (yaml.YAMLError, ValueError):  # no status, but why there is none
        now = {}
    if sys.argv[1:] == ["--times"]:
        print(json.dumps(times(now)))
    else:
        config = yaml.safe_load(Path(sys.argv[1]).read_text(encoding="utf-8"))
        wanted = [application.get("name", "default") for application in config["applications"]]
        print(*progress(wanted, now, json.loads("".join(sys.argv[2:]) or "{}")), sep="\n")

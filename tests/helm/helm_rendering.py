"""The chart, rendered by a real Helm engine; nothing here needs Kubernetes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import helm_python as helm
import yaml

CHART = Path(__file__).parents[2] / "helm" / "moe-ray"
PROFILES = sorted((CHART / "ci").glob("*-values.yaml"))
RELEASE, NAMESPACE = "r", "serving"
Manifest = dict[str, Any]


@dataclass(frozen=True)
class Rendered:
    """What one set of values renders to."""

    manifests: list[Manifest]
    notes: str

    def of(self, kind: str) -> list[Manifest]:
        return [manifest for manifest in self.manifests if manifest["kind"] == kind]

    def one(self, kind: str, suffix: str = "") -> Manifest:
        (found,) = [m for m in self.of(kind) if m["metadata"]["name"].endswith(suffix)]
        return found

    @property
    def service(self) -> Manifest:
        """The RayService's spec."""
        spec: Manifest = self.one("RayService")["spec"]
        return spec

    @property
    def groups(self) -> dict[str, Manifest]:
        """Head and worker groups by name."""
        cluster = self.service["rayClusterConfig"]
        return {"headgroup": cluster["headGroupSpec"]} | {g["groupName"]: g for g in cluster["workerGroupSpecs"]}

    @property
    def serve_config(self) -> Manifest:
        config: Manifest = yaml.safe_load(self.service["serveConfigV2"])
        return config

    @property
    def application(self) -> Manifest:
        (application,) = self.serve_config["applications"]
        found: Manifest = application
        return found

    @property
    def deployments(self) -> dict[str, Manifest]:
        return {entry["name"]: entry for entry in self.application["deployments"]}


def render(values: Manifest | None = None, release: str = RELEASE) -> Rendered:
    """Render with `values` over the chart's own. Raises `helm.HelmError`."""
    with helm.Chart.load(CHART) as chart:
        files = chart.render(values or {}, name=release, namespace=NAMESPACE)
    notes = "".join(text for name, text in files.items() if name.endswith("NOTES.txt"))
    documents = (yaml.safe_load_all(text) for name, text in files.items() if not name.endswith(".txt"))
    return Rendered([document for each in documents for document in each if document], notes)


def profile(name: str) -> Manifest:
    values: Manifest = yaml.safe_load((CHART / "ci" / f"{name}-values.yaml").read_text())
    return values


def bounds(entry: Manifest) -> tuple[int, int, int]:
    """(fewest, at the start, most) replicas of an entry of `deployments`."""
    scaling = entry["autoscaling_config"]
    if scaling is None:
        return entry["num_replicas"], entry["num_replicas"], entry["num_replicas"]
    return scaling["min_replicas"], scaling["initial_replicas"], scaling["max_replicas"]

"""The configuration: one tree of frozen models, one file a section. The environment is read here and nowhere else."""

from moe_ray.config.model import DEMO_MODEL
from moe_ray.config.tls import TlsSection
from moe_ray.config.tree import Config, cluster_token, load_config

__all__ = ["DEMO_MODEL", "Config", "TlsSection", "cluster_token", "load_config"]

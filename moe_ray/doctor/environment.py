"""Checks of what is installed: Python, the packages that moe_ray asks for, and native kernels."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from moe_ray.doctor.finding import Finding, Subject, error, ok, warning
from moe_ray.errors import KernelsUnavailable
from moe_ray.native.build import is_built, kernels_here, libraries, try_compiler


@dataclass(frozen=True, slots=True)
class PackageState:
    """A package that moe_ray asks for."""

    requirement: str
    """As pyproject.toml has it: ray[serve]==2.60.0."""
    installed: str | None
    """Its version; None: it is not installed."""


@dataclass(frozen=True, slots=True)
class EnvironmentFacts:
    """What is installed."""

    python: str
    python_wanted: str
    packages: tuple[PackageState, ...]
    """Empty where moe_ray itself is not installed."""


def installed_facts() -> EnvironmentFacts:
    """Look at this process's environment."""
    try:
        about = metadata.metadata("moe_ray")
        wanted = metadata.requires("moe_ray") or []
    except metadata.PackageNotFoundError:
        return EnvironmentFacts(platform.python_version(), "", ())
    needed = [text for text in wanted if (marker := Requirement(text).marker) is None or marker.evaluate({"extra": ""})]
    packages = tuple(PackageState(text, _version(Requirement(text).name)) for text in needed)
    return EnvironmentFacts(platform.python_version(), about["Requires-Python"] or "", packages)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_python(facts: EnvironmentFacts) -> list[Finding]:
    """Python is one that moe_ray runs on."""
    if facts.python not in SpecifierSet(facts.python_wanted):
        mend = f"make a virtual environment with Python {facts.python_wanted}"
        return [error("python", f"{facts.python}, moe_ray needs {facts.python_wanted}", mend)]
    return [ok("python", f"{facts.python} ({sys.prefix})")]


def check_packages(facts: EnvironmentFacts) -> list[Finding]:
    """Every package is there in a version that moe_ray works with."""
    if not facts.packages:
        return [warning("packages", "moe_ray is not installed in this environment", "pip install -e .")]
    wrong = [_wrong(package) for package in facts.packages]
    found = [each for each in wrong if each is not None]
    return found or [ok("packages", f"{len(facts.packages)} as moe_ray asks for them")]


def _wrong(package: PackageState) -> Finding | None:
    wanted = Requirement(package.requirement)
    mend = f"pip install {package.requirement!r}"
    if package.installed is None:
        return error("packages", f"{wanted.name} is not installed", mend)
    if not wanted.specifier.contains(package.installed, prereleases=True):
        return error("packages", f"{wanted.name} {package.installed}, moe_ray needs {wanted.specifier}", mend)
    return None


@dataclass(frozen=True, slots=True)
class NativeFacts:
    """Whether this machine can run and build the native kernels."""

    system: str
    machine: str
    kernels: str | None
    """The best for this CPU; None: there are none."""
    built: bool
    """All that a server uses lies in the cache."""
    compiler: str | None
    """One that builds them; None: see `fault`."""
    fault: str | None
    wanted: bool
    """The configuration insists on native kernels."""


def native_facts(subject: Subject) -> NativeFacts:
    """Look for the libraries, and try the compiler."""
    compiler, fault = None, None
    try:
        compiler = try_compiler(libraries()[0])
    except KernelsUnavailable as failure:
        fault = str(failure)
    built = all(is_built(library, subject.config.cache_dir) for library in libraries())
    wanted = subject.config.model.kernels not in ("auto", "torch")
    return NativeFacts(sys.platform, platform.machine(), kernels_here(), built, compiler, fault, wanted)


def check_native(facts: NativeFacts) -> list[Finding]:
    """The CPU has native kernels, and they are built or can be."""
    complain = error if facts.wanted else warning
    if facts.kernels is None:
        says = f"none for {facts.system} on {facts.machine} with this CPU's instructions: torch computes, slower"
        return [complain("native kernels", says, "use a Linux machine with AVX2 or arm64, or set model.kernels: torch")]
    if facts.built:
        return [ok("native kernels", f"{facts.kernels}, built")]
    if facts.fault is not None:
        mend = "install a C++ compiler (g++ or clang++), or name one in CXX"
        return [complain("native kernels", f"{facts.kernels} for this CPU, but {facts.fault}: torch computes", mend)]
    return [ok("native kernels", f"{facts.kernels}; {facts.compiler} builds them when a server starts first")]


def examine_environment(subject: Subject) -> Sequence[Finding]:
    """Python, packages, native kernels."""
    facts = installed_facts()
    return [*check_python(facts), *check_packages(facts), *check_native(native_facts(subject))]

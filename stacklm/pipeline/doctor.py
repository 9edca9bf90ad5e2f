"""Check whether this machine can run the main job, with advice for each problem. Also works outside a project.

Every check is a function that takes the project (None outside of one) and returns a finding. Nothing is changed.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import psutil
from packaging.requirements import Requirement

from stacklm.config.data import HuggingFaceSource
from stacklm.config.params import load
from stacklm.config.schema import ParamsError
from stacklm.pipeline.dvc import differing_stages
from stacklm.pipeline.project import Project, check_tools, nvidia_smi
from stacklm.pipeline.tracking.store import artifact_root, is_server, shown_uri, tracking_uri
from stacklm.units import quantity

MEMORY, DISK = 2 * 10**9, 10**9
"""Bytes that the main job needs with the default settings, rounded up: two parallel training runs, Prefect's server, outputs."""
PATIENCE = 3
"""Seconds to wait for a response from the network."""
HUB = "https://huggingface.co"
UI_PORT = 5000
PIP = f"{sys.executable} -m pip install"
SIGN = {"ok": "ok", "note": "note", "missing": "MISSING"}


@dataclass(frozen=True)
class Finding:
    """The result of one check. Only the state `missing` keeps the main job from running."""

    of: str
    state: Literal["ok", "note", "missing"]
    found: str
    advice: str = ""
    """What to do, unless the state is ok."""


def examine(project: Project | None, prefect_api: str | None) -> list[Finding]:
    """All findings, most important first; `prefect_api` is the server that the user has configured, if any."""
    hub = Answer(HUB)  # connects while torch is imported
    return [
        Finding("Python", "ok", f"{platform.python_version()}, {sys.executable}"),
        packages(),
        torch(),
        memory(),
        disk(project),
        git(),
        dvc(project),
        mlflow(project),
        prefect(prefect_api),
        network(project, hub),
        ports(),
        settings(project),
    ]


def text(findings: list[Finding]) -> str:
    """The findings as text, one per line with its advice below, and whether the main job can run."""
    lines = []
    for one in findings:
        lines.append(f"{SIGN[one.state]:<8} {one.of:<9} {one.found}")
        lines += [f"{'':<18} -> {one.advice}"] if one.advice else []
    missing = [one.of for one in findings if one.state == "missing"]
    verdict = (
        f"The main job cannot run yet: {', '.join(missing)}." if missing else "The main job can run: `stacklm run-flow pretrain`."
    )
    return "\n".join([*lines, "", verdict])


def packages() -> Finding:
    """Check that every package that stacklm requires is installed in an accepted version."""
    try:
        required = [Requirement(line) for line in importlib.metadata.requires("stacklm") or []]
    except importlib.metadata.PackageNotFoundError:
        return Finding("packages", "missing", "stacklm runs from source and is not installed", f"{PIP} -e . in the checkout")
    wanted = [one for one in required if one.marker is None or one.marker.evaluate({"extra": ""})]
    wrong = [one for one in wanted if not one.specifier.contains(_version(one.name) or "0", prereleases=True)]
    if not wrong:
        return Finding("packages", "ok", f"all {len(wanted)} required packages are installed")
    found = ", ".join(f"{one.name} {_version(one.name) or 'is not installed'}" for one in wrong)
    return Finding("packages", "missing", found, " ".join([PIP, *(f"'{one}'" for one in wrong)]))


def torch() -> Finding:
    """Check that torch can be imported and computes, and report its device."""
    try:
        import torch

        torch.ones(2, 2).matmul(torch.ones(2, 2))
    except Exception as error:  # a broken installation raises anything
        return Finding("torch", "missing", f"cannot be used: {error}", f"{PIP} --force-reinstall 'torch>=2.11'")
    version = f"{torch.__version__}"
    if torch.cuda.is_available():
        room = quantity(torch.cuda.get_device_properties(0).total_memory, "B")
        return Finding("torch", "ok", f"{version} on {torch.cuda.get_device_name()}, {room}")
    if torch.backends.mps.is_available():
        return Finding("torch", "ok", f"{version} on the Apple GPU")
    cpu = f"{version} on the CPU, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    if gpu := nvidia_smi("name"):
        build = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "has no CUDA"
        return Finding(
            "torch", "note", f"{cpu}; it {build} and cannot use {gpu}", "install the PyTorch build for its driver: pytorch.org"
        )
    return Finding("torch", "ok", cpu)


def memory() -> Finding:
    free = psutil.virtual_memory().available
    found = f"{quantity(free, 'B')} free of {quantity(psutil.virtual_memory().total, 'B')}"
    if free >= MEMORY:
        return Finding("memory", "ok", found)
    return Finding(
        "memory", "note", found, f"the defaults need up to {quantity(MEMORY, 'B')}: close other programs, or see `stacklm plan`"
    )


def disk(project: Project | None) -> Finding:
    """Check free space and write permission in the project's folder and in that of temporary files."""
    for folder in dict.fromkeys([project.root if project else Path.cwd(), Path(tempfile.gettempdir())]):
        if not os.access(folder, os.W_OK):
            return Finding("disk", "missing", f"{folder} is read-only", "use a folder that you can write to")
        if (free := shutil.disk_usage(folder).free) < DISK:
            need = f"the defaults need up to {quantity(DISK, 'B')}: free some, or remove older results with `dvc gc --workspace`"
            return Finding("disk", "missing", f"{quantity(free, 'B')} free at {folder}", need)
    return Finding("disk", "ok", f"{quantity(shutil.disk_usage(project.root if project else Path.cwd()).free, 'B')} free")


def git() -> Finding:
    if shutil.which("git") is None:
        return Finding("git", "missing", "no `git` on the PATH", "install git, which DVC needs: git-scm.com")
    questions = ["git", "--version"], ["git", "config", "user.name"], ["git", "config", "user.email"]
    version, name, mail = (subprocess.run(words, capture_output=True, text=True).stdout.strip() for words in questions)
    if not (name and mail):
        advice = 'git config --global user.name "Your Name"; git config --global user.email you@example.com'
        return Finding("git", "note", f"{version}; user.name or user.email is not set, so it cannot commit", advice)
    return Finding("git", "ok", version)


def dvc(project: Project | None) -> Finding:
    """Check that DVC is installed, works in the project, and has the stages of this version."""
    if not (version := _version("dvc")):
        return Finding("DVC", "missing", "not installed", f"{PIP} 'dvc>=3.60'")
    if project and shutil.which("git"):
        try:
            check_tools(project)
        except ParamsError as error:
            found, _, advice = str(error).rpartition(": ")
            return Finding("DVC", "missing", f"{version}; {found}", advice)
    if project and (differ := differing_stages(project)):
        found = f"{version}; dvc.yaml differs from this version of stacklm in {', '.join(differ)}"
        return Finding("DVC", "note", found, "`stacklm dvc-yaml` regenerates it; `git diff dvc.yaml` then shows the changes")
    return Finding("DVC", "ok", version)


def mlflow(project: Project | None) -> Finding:
    """Check that MLflow is installed and can store runs; training does not depend on it."""
    if not (version := _version("mlflow")):
        return Finding("MLflow", "missing", "not installed", f"{PIP} 'mlflow>=3.10,<4'")
    if project is None:
        return Finding("MLflow", "ok", version)
    try:
        uri, _ = tracking_uri(project), artifact_root(project)
    except RuntimeError as error:
        found, _, advice = str(error).partition(": ")
        return Finding("MLflow", "note", f"{version}; {found}", advice)
    if is_server(uri) and uri.startswith("http") and not Answer(uri).came:
        return Finding("MLflow", "note", f"{version}; {uri} does not answer", "start it; `stacklm sync` then logs the missing runs")
    return Finding("MLflow", "ok", f"{version}, {shown_uri(project)}")


def prefect(api: str | None) -> Finding:
    """Check that Prefect is installed, and that the user's server answers, if one is configured."""
    if not (version := _version("prefect")):
        return Finding("Prefect", "missing", "not installed", f"{PIP} 'prefect>=3.8,<3.9'")
    if not api:
        return Finding("Prefect", "ok", f"{version}; each flow starts and stops its own server")
    if Answer(api).came:
        return Finding("Prefect", "ok", f"{version}, {api}")
    advice = "run `prefect server start`; or unset PREFECT_API_URL and use a profile without it, so that a flow starts its own"
    return Finding("Prefect", "missing", f"{version}; the configured server at {api} does not answer", advice)


def network(project: Project | None, hub: Answer) -> Finding:
    """Check whether the Hugging Face hub answers, and whether the project needs it."""
    if hub.came:
        return Finding("network", "ok", f"{HUB} answers")
    try:
        needed = project is not None and isinstance(load(project.params_file).data.source, HuggingFaceSource)
    except (ParamsError, OSError):
        needed = False
    if needed:
        advice = "connect, or set HTTPS_PROXY; data that was downloaded before needs no connection"
        return Finding("network", "missing", f"{HUB} does not answer, and data.source needs it", advice)
    return Finding("network", "note", f"{HUB} does not answer", "not needed unless data.source is `kind: huggingface`")


def ports() -> Finding:
    """Check that a flow's server can listen on this machine, and that the port of `stacklm ui` is free."""
    try:
        socket.create_server(("127.0.0.1", 0)).close()
    except OSError as error:
        advice = "allow programs to listen on 127.0.0.1; `dvc repro` needs no server"
        return Finding("ports", "missing", f"no port can be opened on 127.0.0.1: {error}", advice)
    try:
        socket.create_server(("127.0.0.1", UI_PORT)).close()
    except OSError:
        return Finding("ports", "note", f"{UI_PORT} is in use", f"`stacklm ui --port {UI_PORT + 1}`, unless your MLflow uses it")
    return Finding("ports", "ok", f"{UI_PORT} is free for `stacklm ui`")


def settings(project: Project | None) -> Finding:
    if project is None:
        return Finding("project", "note", "not inside a project", "`stacklm init my-lab` makes a new one")
    try:
        load(project.params_file)
    except ParamsError as error:
        return Finding("project", "missing", f"{project.root}: {error}", "`stacklm params` explains every key")
    return Finding("project", "ok", f"{project.root}")


class Answer:
    """A connection to the host of an address, or to the proxy that the user has set, tried in the background."""

    def __init__(self, url: str) -> None:
        self._came = False
        self._thread = threading.Thread(target=self._try, args=(url,), daemon=True)  # name lookup may be slow
        self._thread.start()

    @property
    def came(self) -> bool:
        """Whether the connection succeeded; waits at most `PATIENCE` more seconds."""
        self._thread.join(PATIENCE)
        return self._came

    def _try(self, url: str) -> None:
        parts = urlsplit(url)
        proxy = getproxies().get(parts.scheme)
        if proxy and not proxy_bypass(parts.netloc):
            parts = urlsplit(proxy)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        with contextlib.suppress(OSError):
            socket.create_connection((parts.hostname or "", port), timeout=PATIENCE).close()
            self._came = True


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

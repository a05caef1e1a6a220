"""`pilotfish env`: what matters of this machine for serving, and what to fix."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import shutil
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES = ("pilotfish", "torch", "triton", "transformers", "ray", "grpcio", "protobuf", "safetensors", "tokenizers")
_MIN_OPEN_FILES = 4096


@dataclass
class Report:
    """Facts in the order they are printed, and what to fix."""

    facts: dict[str, str] = field(default_factory=dict)
    to_fix: list[str] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.epilog = "Exits 1 when there is something to fix."


def run(args: argparse.Namespace) -> int:
    report = Report()
    for probe in (_versions, _machine, _kernels, _gpus, _limits, _cache):
        probe(report)
    if args.json:
        print(json.dumps({"facts": report.facts, "to_fix": report.to_fix}, indent=2))
    else:
        width = max(map(len, report.facts))
        for name, value in report.facts.items():
            print(f"{name:{width}}  {value}")
        print("\nTo fix:" if report.to_fix else "\nNothing to fix.")
        for line in report.to_fix:
            print(f"  - {line}")
    return 1 if report.to_fix else 0


def _versions(report: Report) -> None:
    report.facts["python"] = platform.python_version()
    missing = []
    for package in PACKAGES:
        try:
            report.facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            report.facts[package] = "not installed"
            missing.append(package)
    if missing:
        report.to_fix.append(f"install {', '.join(missing)}: pip install 'pilotfish[server]'")


def _machine(report: Report) -> None:
    report.facts["system"] = f"{platform.system()} {platform.release()} {platform.machine()}"
    report.facts["cpu cores usable"] = str(len(os.sched_getaffinity(0)))
    memory = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, available = (int(memory[key].split()[0]) / 2**20 for key in ("MemTotal", "MemAvailable"))
    report.facts["memory"] = f"{total:.1f} GiB, {available:.1f} GiB available"
    shm = shutil.disk_usage("/dev/shm")
    report.facts["shared memory (/dev/shm)"] = f"{shm.total / 2**30:.1f} GiB, {shm.free / 2**30:.1f} GiB free"
    if shm.free < 1 << 28:
        report.to_fix.append("/dev/shm has under 256 MiB free, Ray needs it: start the container with --shm-size=2g or more")


def _kernels(report: Report) -> None:
    try:
        from ..kernels.dispatch import backend_report
    except ModuleNotFoundError:
        return  # torch or triton: _versions has said so
    try:
        backends = backend_report()
    except ValueError as error:  # of PILOTFISH_KERNELS
        report.to_fix.append(str(error))
        return
    for device, backend in backends.items():
        report.facts[f"kernels on {device}"] = backend
        if device == "cpu" and "slower" in backend:
            report.to_fix.append(f"CPU kernels do not run: {backend}; install a C++ compiler (Debian: apt-get install g++)")


def _gpus(report: Report) -> None:
    try:
        import torch
    except ModuleNotFoundError:
        return
    count = torch.cuda.device_count()
    report.facts["GPUs"] = str(count)
    if torch.version.cuda is None and (Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi")):
        report.to_fix.append("there is an NVIDIA GPU, but torch is a CPU build: install torch with CUDA")
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        peers = [str(peer) for peer in range(count) if peer != index and torch.cuda.can_device_access_peer(index, peer)]
        report.facts[f"GPU {index}"] = (
            f"{properties.name}, compute {properties.major}.{properties.minor}, {total / 2**30:.0f} GiB, "
            f"{free / 2**30:.0f} GiB free, peer access to {', '.join(peers) or 'none'}"
        )
        if properties.major < 8:
            report.to_fix.append(
                f"GPU {index} has compute capability {properties.major}.{properties.minor}; 8.0 or newer is needed"
            )
    if count:
        report.facts["CUDA of torch"] = str(torch.version.cuda)
        report.facts["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))


def _limits(report: Report) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    report.facts["open files"] = f"{soft} (at most {hard})"
    if soft < _MIN_OPEN_FILES:
        report.to_fix.append(f"only {soft} open files are allowed: ulimit -n 65536")


def _cache(report: Report) -> None:
    try:
        from ..models.embedded import EMBEDDED_MODELS
        from ..models.store_publish import models_directory
    except ModuleNotFoundError:
        return
    directory = models_directory()
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    report.facts["cache"] = f"{directory}, {shutil.disk_usage(existing).free / 2**30:.1f} GiB free"
    pulled = [alias for alias, model in EMBEDDED_MODELS.items() if model.problem is None]
    report.facts["pulled models"] = ", ".join(pulled) or "none"
    if not os.access(existing, os.W_OK):
        report.to_fix.append(f"the cache {directory} cannot be written: set PILOTFISH_CACHE to a directory that you can write")

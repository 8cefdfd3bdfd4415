"""`python -m wris_lib doctor`: what of the course works here, line by line, and how to mend the rest.

A finding is OK, WARN (the course runs, something optional or comfortable is lacking) or FAIL. Whatever is not OK ends
with the command that mends it. Packages are imported inside a check, so that a broken one is a finding and
not a crash.
"""

import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

from wris_lib.errors import WrisError

CHECKOUT = Path(__file__).resolve().parent.parent
DISTRIBUTION = "wris-lib"

# What to import when that is not the distribution's name with underscores.
MODULES = {
    "opencv-python-headless": "cv2",
    "open-clip-torch": "open_clip",
    "pillow": "PIL",
    "pycocotools": "pycocotools.mask",
    "salesforce-lavis": "lavis.models",
    "eva-decord": "decord",
    "pytest-xdist": "xdist",
    "pyyaml": "yaml",
}
OPTIONAL = {"salesforce-lavis": "only what uses ALBEF needs it"}
KERNEL_SECONDS = 60
MEMORY_WANTED = 4  # GB available; the notebooks together with JupyterLab stay below that
DISK_NEEDED, DISK_WANTED = 1, 8  # GB; the toy datasets, and what pretraining adds to them


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        level: "OK", "WARN" or "FAIL".
        subject: what was looked at.
        text: what was found.
        mend: the command that mends it; empty for OK.
    """

    level: str
    subject: str
    text: str
    mend: str = ""

    def __str__(self) -> str:
        line = f"{f'[{self.level}]':6} {self.subject}: {self.text}"
        return f"{line}; mend it with: {self.mend}" if self.mend else line


Check = Callable[[], Iterator[Finding]]


def main() -> int:
    """Print the report as it is made; 1 if anything failed, otherwise 0."""
    levels = []
    for finding in findings(CHECKS):
        print(finding, flush=True)
        levels.append(finding.level)
    failed, warned = levels.count("FAIL"), levels.count("WARN")
    print(f"{len(levels) - failed - warned} fine, {warned} to know about, {failed} to mend.")
    return int(failed > 0)


def findings(checks: dict[str, Check]) -> Iterator[Finding]:
    """What the checks find. A check that breaks is a finding itself."""
    for subject, check in checks.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield from check()
        except WrisError as error:  # says itself how to mend it
            text, _, mend = str(error).partition("; ")
            yield Finding("FAIL", subject, text, mend.rstrip("."))
        except Exception as error:
            yield Finding("FAIL", subject, f"the check broke off ({_brief(error)})", _reinstall())


def check_python() -> Iterator[Finding]:
    found = f"{platform.python_version()} in {sys.prefix}"
    if (3, 10) <= sys.version_info[:2] <= (3, 13):
        yield Finding("OK", "Python", found)
    else:
        yield Finding("FAIL", "Python", f"{found}, but the course needs 3.10 to 3.13", "PYTHON=python3.11 make setup")


def check_device() -> Iterator[Finding]:
    try:
        import torch
    except Exception as error:
        yield Finding("FAIL", "device", f"torch cannot be imported ({_brief(error)})", _reinstall("torch"))
        return
    cores = f"torch {torch.__version__} on {os.cpu_count()} CPU cores"
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        yield Finding("OK", "device", f"torch {torch.__version__} on {gpu.name} with {gpu.total_memory / 1e9:.0f} GB")
    elif shutil.which("nvidia-smi"):
        reason = f"torch cannot use the GPU; the driver may be too old for CUDA {torch.version.cuda}"
        yield Finding("WARN", "device", f"{cores}, for {reason}", "nvidia-smi")
    else:
        yield Finding("OK", "device", cores)


def check_packages() -> Iterator[Finding]:
    """Each package that pyproject.toml names: is it there, in its range, and can it be imported?"""
    try:
        required = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        yield Finding("FAIL", "packages", f"the course is not installed in {sys.prefix}", _set_up())
        return
    from packaging.requirements import Requirement

    for requirement in map(Requirement, required):
        if requirement.marker is None or requirement.marker.evaluate():
            yield check_package(requirement.name, requirement.specifier)


def check_package(name: str, allowed: "packaging.specifiers.SpecifierSet") -> Finding:
    """One package, by its name in the package index and the versions that will do."""
    name = name.lower().replace("_", "-")
    lacking = "WARN" if name in OPTIONAL else "FAIL"
    remark = f", but {OPTIONAL[name]}" if name in OPTIONAL else ""
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(lacking, name, f"is missing{remark}", _complete())
    if not allowed.contains(version, prereleases=True):
        return Finding(lacking, name, f"{version}, but the course needs {allowed}{remark}", _complete())
    try:
        import_module(MODULES.get(name, name.replace("-", "_")))
    except ModuleNotFoundError as error:
        return Finding(lacking, name, f"{version} needs {error.name}, which is missing{remark}", _complete())
    except Exception as error:
        return Finding(lacking, name, f"{version} cannot be imported ({_brief(error)}){remark}", _reinstall(name))
    return Finding("OK", name, version)


def check_toy_weights() -> Iterator[Finding]:
    from wris_lib.backbones import checkpoints

    for checkpoint in checkpoints.STACKS["toy"].checkpoints:
        subject = f"toy weights {checkpoint.file}"
        try:
            path = checkpoints.checkpoint_path(checkpoint)
            checkpoints.verify(path, checkpoints.expected_sha256(checkpoint))
        except WrisError as error:
            yield Finding("FAIL", subject, str(error).split(";")[0], "git checkout -- wris_lib/weights")
        else:
            yield Finding("OK", subject, f"{path.stat().st_size / 1e6:.1f} MB, hash as recorded")


def check_kernel() -> Iterator[Finding]:
    """Start the kernel that notebooks ask for, and see where it imports the course from."""
    from jupyter_client.manager import start_new_kernel

    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    manager, client = start_new_kernel(startup_timeout=KERNEL_SECONDS, kernel_name="python3", **silent)
    answers = []
    try:
        reply = client.execute_interactive(
            "import sys, wris_lib; print(sys.prefix)",
            timeout=KERNEL_SECONDS,
            output_hook=lambda message: answers.append(message["content"].get("text", "")),
        )
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    prefix = "".join(answers).strip()
    if reply["content"]["status"] != "ok":
        yield Finding("FAIL", "kernel", f"starts, but cannot import wris_lib ({reply['content']['ename']})", _set_up())
    elif Path(prefix) != Path(sys.prefix):
        yield Finding("WARN", "kernel", f"python3 runs in {prefix}, not in {sys.prefix}", "make lab")
    else:
        yield Finding("OK", "kernel", f"python3 starts in {prefix}")


def check_memory() -> Iterator[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    text = f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB available"
    if memory.available > MEMORY_WANTED * 1e9:
        yield Finding("OK", "memory", text)
    else:
        closing = "close other programs and kernels, which this shows: ps aux --sort=-rss | head"
        yield Finding("WARN", "memory", f"{text}, {MEMORY_WANTED} GB are comfortable", closing)


def check_disk() -> Iterator[Finding]:
    from wris_lib.files import cache_dir

    folder = cache_dir()
    free = shutil.disk_usage(folder).free / 1e9
    elsewhere = "export WRIS_CACHE=/a/folder/with/room"
    if free < DISK_NEEDED:
        yield Finding("FAIL", "disk", f"{free:.1f} GB free, the toy world needs {DISK_NEEDED} GB", elsewhere)
    elif free < DISK_WANTED:
        text = f"{free:.1f} GB free, enough for the notebooks; pretraining wants {DISK_WANTED} GB"
        yield Finding("WARN", "disk", text, elsewhere)
    else:
        yield Finding("OK", "disk", f"{free:.0f} GB free for the cache")


def check_cache() -> Iterator[Finding]:
    from wris_lib.files import cache_dir

    yield Finding("OK", "cache", str(cache_dir()))


def check_paper_stack() -> Iterator[Finding]:
    from wris_lib.backbones.checkpoints import FETCH, STACKS, hub_download, is_downloaded, paper_status, spacy_download

    paper = STACKS["paper"]
    needed = {file: (status, FETCH) for file, status in paper_status().items()}
    needed[paper.parser] = ("ready" if find_spec(paper.parser) else "missing", spacy_download(paper.parser))
    for name in (paper.llm, paper.mask2former):
        needed[name] = ("ready" if is_downloaded(name) else "missing", hub_download(name))
    for name, (status, mend) in needed.items():
        if status == "ready":
            yield Finding("OK", f"paper stack {name}", "ready")
        else:
            found = "not yet compared with its source" if status == "unchecked" else status
            yield Finding("WARN", f"paper stack {name}", f"{found}, but the toy stack does without", mend)


def check_paper_data() -> Iterator[Finding]:
    from wris_lib.data.archives import data_status
    from wris_lib.download import FETCH

    found = data_status()
    text = ", ".join(f"{dataset} {status}" for dataset, status in found.items())
    if "ready" in found.values():
        yield Finding("OK", "paper stack data", text)
    else:
        lacking = f"{text}, but the toy stack does without"
        yield Finding("WARN", "paper stack data", lacking, f"{FETCH} --data {next(iter(found))}")


CHECKS: dict[str, Check] = {
    "Python": check_python,
    "device": check_device,
    "packages": check_packages,
    "toy weights": check_toy_weights,
    "kernel": check_kernel,
    "memory": check_memory,
    "disk": check_disk,
    "cache": check_cache,
    "paper stack": check_paper_stack,
    "paper stack data": check_paper_data,
}


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _in_conda() -> bool:
    return (Path(sys.prefix) / "conda-meta").is_dir()


def _python() -> str:
    """This interpreter, as one would type it in the checkout."""
    path = Path(sys.executable)
    return str(path.relative_to(CHECKOUT)) if path.is_relative_to(CHECKOUT) else str(path)


def _set_up() -> str:
    return "conda env update -f environment.yml" if _in_conda() else "make setup"


def _complete() -> str:
    """Put every package to the version that was tested."""
    if _in_conda():
        return "conda env update -f environment.yml"
    return f"{_python()} -m pip install --use-pep517 --no-deps -r requirements.lock"


def _reinstall(name: str = "") -> str:
    """Put one package anew, in the version that is installed; without a name, the whole environment."""
    if not name:
        return "rm -rf .venv && make setup" if not _in_conda() else "conda env update -f environment.yml"
    try:
        wanted = f"{name}=={metadata.version(name)}"
    except metadata.PackageNotFoundError:
        return _complete()
    return f"{_python()} -m pip install --no-deps --force-reinstall {wanted}"

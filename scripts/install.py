"""Make or complete `.venv`: the packages of requirements.lock, and this project in editable form.

Started by scripts/setup, under the Python that the environment is for. Uses the standard library only. Nothing is
written outside the checkout but pip's own cache.
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "set-up.json"
LOG = VENV / "set-up.log"
TEMPORARY = VENV / "tmp"

# What the environment takes while it is made, in GB. On Linux torch brings NVIDIA's libraries along.
DISK_NEEDED = 9 if sys.platform == "linux" else 4

# What pip writes when something outside it is in the way, and how to say that.
CAUSES = {
    "the disk is full; free about {disk} GB": ("No space left on device", "Disk quota exceeded"),
    "the package index could not be reached; connect to the network, or check the proxy and pip's settings": (
        "NewConnectionError",
        "NameResolutionError",
        "ConnectTimeout",
        "ReadTimeout",
        "Read timed out",
        "ProxyError",
        "Connection aborted",
        "Connection broken",
        "Network is unreachable",
    ),
}


class SetupError(Exception):
    """One sentence for the person who typed `make`."""


def main() -> int:
    place, content = wanted_place(), wanted_content()
    if read_stamp() == {"place": place, "content": content}:
        return 0
    try:
        # A second `make` waits here; pip inherits the lock, so that an orphaned pip is waited for as well.
        with open(__file__, "r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if read_stamp() != {"place": place, "content": content}:
                set_up(place, content, lock.fileno())
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: cannot set up {VENV}: {error.strerror or error}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nSet-up stopped; the same command continues it.", file=sys.stderr)
        return 130
    return 0


def wanted_place() -> str:
    """An environment works only where it was made, and with the Python that made it."""
    return f"{VENV} with Python {sys.version_info.major}.{sys.version_info.minor} of {sys.base_prefix}"


def wanted_content() -> str:
    """Changes when something here would be installed differently."""
    files = [ROOT / "requirements.lock", ROOT / "pyproject.toml", Path(__file__)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def read_stamp() -> dict[str, str]:
    try:
        stamp = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}
    return stamp if PYTHON.exists() else {}


def set_up(place: str, content: str, lock: int) -> None:
    check_disk()
    continued = read_stamp().get("place") == place
    verb = "Completing" if continued else "Making"
    print(f"{verb} {VENV} (Python {sys.version.split()[0]}). The first time takes some minutes.", flush=True)
    if not continued:
        make_venv(place)
    remove_half_installed()
    pip(lock, "--use-pep517", "-r", "requirements.lock")
    pip(lock, "--no-build-isolation", "-e", ".")
    shutil.rmtree(TEMPORARY, ignore_errors=True)
    write_stamp({"place": place, "content": content})
    print("Done.", flush=True)


def check_disk() -> None:
    present = sum(file.lstat().st_size for file in VENV.rglob("*")) if VENV.exists() else 0
    available = (shutil.disk_usage(ROOT).free + present) / 1e9
    if available < DISK_NEEDED:
        raise SetupError(
            f"the environment needs {DISK_NEEDED} GB of disk, but {ROOT} has {available:.1f} GB free; "
            "make room, or clone the repository to a larger disk, and run the same command again."
        )


def make_venv(place: str) -> None:
    # The base interpreter, since `--clear` may remove the one that runs this.
    base = getattr(sys, "_base_executable", sys.executable)
    made = subprocess.run([base, "-m", "venv", "--clear", str(VENV)], capture_output=True, text=True)
    if made.returncode:
        reason = (made.stdout + made.stderr).strip().splitlines() or ["no reason given"]
        raise SetupError(f"{base} could not make {VENV}: {reason[-1]}")
    write_stamp({"place": place})


def write_stamp(stamp: dict[str, str]) -> None:
    partial = STAMP.with_suffix(".partial")
    partial.write_text(json.dumps(stamp))
    os.replace(partial, STAMP)


def remove_half_installed() -> None:
    """pip writes RECORD last, but takes a package for installed as soon as its METADATA is there."""
    for folder in VENV.glob("lib/python*/site-packages/*.dist-info"):
        if not (folder / "RECORD").exists():
            shutil.rmtree(folder)


def pip(lock: int, *arguments: str) -> None:
    """`pip install` with one line of progress on a terminal, its whole output in the log, and readable failures."""
    TEMPORARY.mkdir(exist_ok=True)  # /tmp is often a small memory disk
    surroundings = {"TMPDIR": str(TEMPORARY), "PIP_USER": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    process = subprocess.Popen(
        [str(PYTHON), "-m", "pip", "install", "--no-deps", "--no-input", "--no-compile", *arguments],
        cwd=ROOT,
        env=os.environ | surroundings,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        pass_fds=[lock],
    )
    lines = []
    with open(LOG, "a") as log:
        for line in process.stdout:
            log.write(line)
            lines.append(line)
            show(line)
    show("")
    if process.wait():
        raise SetupError(readable(lines))


def show(line: str) -> None:
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns - 1
        print("\r" + line.strip()[:width].ljust(width), end="" if line else "\r", flush=True)


def readable(lines: list[str]) -> str:
    """The likely cause in pip's output, as one sentence."""
    output = "".join(lines)
    for cause, signs in CAUSES.items():
        if any(sign in output for sign in signs):
            return cause.format(disk=DISK_NEEDED) + ", and run the same command again."
    errors = [line.strip() for line in lines if line.startswith("ERROR:")] or [line.strip() for line in lines[-1:]]
    return f"pip stopped with '{errors[0] if errors else 'no message'}'; its whole output is in {LOG}."


if __name__ == "__main__":
    sys.exit(main())

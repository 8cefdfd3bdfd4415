"""`make lab` in the background: the server that learners start, told only not to open a window and not to save."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PATIENCE = 300  # seconds until the server answers; it may have to share the machine

# JupyterLab shows itself to scripts in the page, which ask it for the state of kernel and cells.
LAB = {"LabApp": {"open_browser": False, "expose_app_in_browser": True}}
# Cells are run in the committed notebooks, so nothing may be written there.
SETTINGS = {"@jupyterlab/docmanager-extension:plugin": {"autosave": False}}


@contextmanager
def make_lab(folder: Path, log: Path) -> Iterator[dict]:
    """Run `make lab` for a while.

    Args:
        folder: empty, for settings that are nobody's own.
        log: where to write what the server says.

    Yields:
        What the server says of itself: "url", "token", and more.
    """
    settings = folder / "config" / "labconfig" / "default_setting_overrides.json"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps(SETTINGS))
    (folder / "config" / "jupyter_lab_config.json").write_text(json.dumps(LAB))
    surroundings = {
        "JUPYTER_CONFIG_PATH": str(folder / "config"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
    }
    with open(log, "w") as output:
        make = subprocess.Popen(
            ["make", "lab"],
            cwd=ROOT,
            env=os.environ | surroundings,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield _started(make, folder / "runtime", log)
    finally:
        _stop(make)


def _started(make: subprocess.Popen, folder: Path, log: Path) -> dict:
    end = time.monotonic() + PATIENCE
    while make.poll() is None and time.monotonic() < end:
        time.sleep(0.2)
        for file in folder.glob("jpserver-*.json"):
            with suppress(ValueError):  # half written
                return json.loads(file.read_text())
    raise RuntimeError(f"`make lab` did not start a server in {PATIENCE} seconds; it said: {log.read_text()[-2000:]}")


def _stop(make: subprocess.Popen) -> None:
    """The server ends its kernels when it is asked to end; what does not is killed."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(make.pid, number)
            make.wait(30)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue

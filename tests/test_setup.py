"""Set-up: the lock, environment.yml, and scripts/setup on a checkout small enough to set up within a test."""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import packages_distributions
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PATIENCE = 600  # seconds; only so that nothing hangs for ever on a machine that has much else to do
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
LOCKS = {  # of pyproject.toml's extras
    "docs/requirements.lock": "book",
    "scripts/requirements.lock": "grading",
    "tests/browser/requirements.lock": "browser",
}
PLATFORMS = {
    "linux": {"sys_platform": "linux", "platform_machine": "x86_64", "os_name": "posix"},
    "macos": {"sys_platform": "darwin", "platform_machine": "arm64", "os_name": "posix"},
}


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lock(file: str = "requirements.lock") -> list[Requirement]:
    lines = (ROOT / file).read_text().splitlines()
    return [Requirement(line.split("#")[0]) for line in lines if line.split("#")[0].strip()]


def dependencies() -> list[Requirement]:
    listed = re.search(r"^dependencies = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)[1]
    return [Requirement(line) for line in re.findall(r'^ *"(.*?)"', listed, re.M)]


# The lock and environment.yml


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_has_one_fitting_version_of_each_dependency(python: str, platform: str):
    markers = default_environment() | PLATFORMS[platform] | {"python_version": python, "python_full_version": python}
    versions: dict[str, str] = {}
    for pin in lock():
        if pin.marker is None or pin.marker.evaluate(markers):
            (specifier,) = pin.specifier
            assert specifier.operator == "==" and "*" not in specifier.version
            assert canonicalize_name(pin.name) not in versions
            versions[canonicalize_name(pin.name)] = specifier.version
    for wanted in dependencies():
        if wanted.marker is None or wanted.marker.evaluate(markers):
            assert versions[canonicalize_name(wanted.name)] in wanted.specifier


@pytest.mark.parametrize("file", ["requirements.lock", *LOCKS, "environment.yml", "pyproject.toml"])
def test_no_package_index_is_named(file: str):
    assert not re.search(r"https?://|--(extra-)?index-url|--find-links", (ROOT / file).read_text())


@pytest.mark.parametrize("file, extra", LOCKS.items())
def test_what_comes_on_top_fits_the_extra(file: str, extra: str):
    listed = re.search(rf"^{extra} = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)[1]
    pins = {pin.name: pin.specifier for pin in lock(file)}
    for wanted in map(Requirement, re.findall(r'"(.*?)"', listed)):
        (pin,) = pins[wanted.name]
        assert pin.operator == "==" and pin.version in wanted.specifier


def test_environment_yml_fits_the_ranges_of_pyproject():
    *pins, project = script("check_environment").pip_section((ROOT / "environment.yml").read_text())
    assert project == "-e ."
    pinned = {canonicalize_name(Requirement(pin).name): Requirement(pin).specifier for pin in pins}
    assert {"torch", "open-clip-torch", "salesforce-lavis", "timm", "transformers", "numpy", "spacy"} <= set(pinned)
    for wanted in dependencies():
        for specifier in pinned.get(canonicalize_name(wanted.name), []):
            lowest = specifier.version.removesuffix(".*")
            assert specifier.operator == "<" or lowest in wanted.specifier


def test_a_pip_section_is_read_without_its_comments():
    text = "dependencies:\n  - pip\n  - pip:\n      - torch==2.0  # why\n      - a[b]>=1,<2\n      - -e .  # the rest\n"
    pip_section = script("check_environment").pip_section
    assert pip_section(text) == ["torch==2.0", "a[b]>=1,<2", "-e ."]
    with pytest.raises(ValueError, match="no pip section"):
        pip_section("dependencies:\n  - pip\n")


def test_only_decords_platform_tag_is_passed_over():
    unexpected = script("check_environment").unexpected
    assert unexpected("No broken requirements found.\n") == []
    assert unexpected("decord 0.6.0 is not supported on this platform\n") == []
    assert unexpected("timm 1.0 is not supported on this platform\n") == ["timm 1.0 is not supported on this platform"]
    assert unexpected("a 1 requires b, which is not installed.\n") == ["a 1 requires b, which is not installed."]


def test_everything_that_is_imported_is_locked():
    locked = {canonicalize_name(pin.name) for file in ("requirements.lock", *LOCKS) for pin in lock(file)}
    providers = packages_distributions()
    sources = [*ROOT.glob("wris_lib/**/*.py"), *ROOT.glob("tests/**/*.py"), *ROOT.glob("notebooks/*.ipynb")]
    for source in sources:
        # In a notebook's JSON a line of code begins after a quotation mark.
        for module in re.findall(r'^[ "]*(?:import|from) ([A-Za-z_]\w*)[ .\\]', source.read_text(), re.M):
            if module in providers and module not in sys.stdlib_module_names | {"wris_lib", "tests"}:
                names = {canonicalize_name(name) for name in providers[module]}
                assert names & locked, f"{source} imports {module}, which is in no package of the lock"


def test_make_test_runs_the_four_checks():
    listed = subprocess.run(["make", "-n", "test"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    unit_tests = "pytest -p no:nbmake -n auto --maxprocesses 4 --dist loadfile tests"
    for check in ("ruff check", "ruff format --check", unit_tests, "pytest --nbmake notebooks"):
        assert f".venv/bin/python -m {check}\n" in listed
    described = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    commands = "lab", "test", "test-browser", "setup", "student", "assignments"
    assert all(f"make {command}" in described for command in commands)


# scripts/setup, on a checkout with one dependency, both built by a backend that needs no other package

BACKEND = """
import pathlib, time, zipfile

def build_wheel(directory, config_settings=None, metadata_directory=None):
    name = pathlib.Path.cwd().name.split("_")[0]
    hurdle = pathlib.Path("hurdle")  # while it exists, the build does not end
    if hurdle.exists():
        hurdle.write_text("reached")
    while hurdle.exists():
        time.sleep(0.02)
    info = f"{name}-1.dist-info"
    with zipfile.ZipFile(f"{directory}/{name}-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", "")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\\nName: {name}\\nVersion: 1\\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(f"{info}/RECORD", f"{name}.py,,\\n{info}/METADATA,,\\n{info}/WHEEL,,\\n{info}/RECORD,,\\n")
    return f"{name}-1-py3-none-any.whl"

build_editable = build_wheel
"""
PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "NAME"
version = "1"
"""


class Checkout:
    """A checkout called `course`, with a dependency in its folder `needed`."""

    def __init__(self, root: Path):
        self.root = root
        self.hurdle = root / "needed" / "hurdle"
        for folder in (root, root / "needed"):
            folder.mkdir()
            (folder / "backend.py").write_text(BACKEND)
            (folder / "pyproject.toml").write_text(PYPROJECT.replace("NAME", folder.name.split("_")[0]))
        (root / "scripts").mkdir()
        for name in ("setup", "install.py"):
            shutil.copy(ROOT / "scripts" / name, root / "scripts" / name)
        self.lock("./needed")

    def lock(self, lines: str) -> None:
        (self.root / "requirements.lock").write_text(lines + "\n")

    def start(self, **surroundings: str) -> subprocess.Popen:
        # No package index is asked for anything, whatever pip's configuration on this machine.
        offline = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PYTHON": sys._base_executable}
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
        return subprocess.Popen(
            [self.root / "scripts" / "setup"],
            env=environment | offline | surroundings,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # Where these tests run in the background, Ctrl-C is ignored, and set-up would inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def set_up(self, **surroundings: str) -> SimpleNamespace:
        process = self.start(**surroundings)
        out, err = process.communicate(timeout=PATIENCE)
        return SimpleNamespace(code=process.returncode, out=out, err=err)

    def modules(self) -> set[str]:
        return {path.stem for path in self.root.glob(".venv/lib/python*/site-packages/*.py")}

    def wait_for_hurdle(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while self.hurdle.read_text() != "reached":
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """Set up, once for all tests of this file."""
    checkout = Checkout(tmp_path_factory.mktemp("setup") / "course")
    done = checkout.set_up()
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("Making ") and done.out.endswith("Done.\n")
    return checkout


def test_set_up_installs_lock_and_project(checkout: Checkout):
    assert {"needed", "course"} <= checkout.modules()


def test_a_second_set_up_does_nothing(checkout: Checkout):
    before = (checkout.root / ".venv" / "set-up.log").stat().st_mtime
    done = checkout.set_up()
    assert (done.code, done.out, done.err) == (0, "", "")
    assert (checkout.root / ".venv" / "set-up.log").stat().st_mtime == before


def test_another_lock_completes_the_environment(checkout: Checkout):
    python = checkout.root / ".venv" / "bin" / "python"
    born = python.lstat().st_ino
    subprocess.run([python, "-m", "pip", "uninstall", "-qy", "needed"], check=True)
    checkout.lock("./needed  # changed")
    done = checkout.set_up()
    assert done.code == 0 and done.out.startswith("Completing ")
    assert "needed" in checkout.modules() and python.lstat().st_ino == born


def test_a_stopped_set_up_says_so_and_goes_on(checkout: Checkout):
    checkout.lock("./needed  # to be stopped")
    checkout.hurdle.touch()
    process = checkout.start()
    checkout.wait_for_hurdle()
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert err == "\nSet-up stopped; the same command continues it.\n"
    checkout.hurdle.unlink()
    assert checkout.set_up().code == 0


def test_a_killed_set_up_goes_on_when_its_pip_has_ended(checkout: Checkout):
    checkout.lock("./needed  # to be killed")
    checkout.hurdle.touch()
    process = checkout.start()
    checkout.wait_for_hurdle()
    process.kill()
    process.wait()
    second = checkout.start()
    time.sleep(0.5)
    assert second.poll() is None  # the first one's pip is still at work
    checkout.hurdle.unlink()
    out, err = second.communicate(timeout=PATIENCE)
    assert (second.returncode, err) == (0, "") and out.endswith("Done.\n")
    assert "needed" in checkout.modules()


def test_a_half_installed_package_is_installed_again(checkout: Checkout):
    (info,) = checkout.root.glob(".venv/lib/python*/site-packages/needed-1.dist-info")
    (info / "RECORD").unlink()
    (info.parent / "needed.py").unlink()
    checkout.lock("./needed  # once more")
    assert checkout.set_up().code == 0
    assert "needed" in checkout.modules() and (info / "RECORD").exists()


def test_without_network_one_sentence(checkout: Checkout):
    checkout.lock("wris-nowhere==1")
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_NO_INDEX": "0", "PIP_RETRIES": "1"}
    done = checkout.set_up(**nowhere)
    assert done.code == 1
    assert done.err == (
        "error: the package index could not be reached; connect to the network, or check the proxy and pip's "
        "settings, and run the same command again.\n"
    )


def test_whatever_else_stops_pip_is_named(checkout: Checkout):
    checkout.lock("wris-nowhere==1")
    done = checkout.set_up()
    assert done.code == 1 and done.err.count("\n") == 1
    assert done.err.startswith("error: pip stopped with 'ERROR: Could not find a version that satisfies")
    assert "set-up.log" in done.err


def test_an_environment_that_was_moved_is_made_again(checkout: Checkout):
    checkout.lock("./needed")
    home, moved = checkout.root, checkout.root.with_name("course_moved")
    checkout.root = home.rename(moved)
    try:
        done = checkout.set_up()
        assert (done.code, done.err) == (0, "") and done.out.startswith(f"Making {moved}")
        assert str(moved) in (moved / ".venv" / "bin" / "pip").read_text().splitlines()[0]
    finally:
        checkout.root = moved.rename(home)


@pytest.mark.parametrize("python", ["/nowhere/python", "/bin/false"])
def test_a_python_that_does_not_do(python: str, checkout: Checkout):
    done = checkout.set_up(PYTHON=python)
    assert done.code == 1 and done.err.count("\n") == 1
    assert done.err.startswith("error: no Python 3.10 to 3.13") and f"(looked for: {python})" in done.err


def test_no_python_at_all(tmp_path: Path):
    checkout = Checkout(tmp_path / "course")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "dirname").symlink_to(shutil.which("dirname"))
    (tmp_path / "bin" / "python3").write_text("#!/bin/sh\nexit 1\n")  # as Debian's, without its venv module
    (tmp_path / "bin" / "python3").chmod(0o755)
    done = checkout.set_up(PATH=str(tmp_path / "bin"), PYTHON="")
    assert done.code == 1 and done.err.count("\n") == 1
    assert "install Python 3.11" in done.err and "python3-venv" not in done.out
    assert not (checkout.root / ".venv").exists()


# scripts/install.py from inside


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = script("install")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(module, "STAMP", tmp_path / ".venv" / "set-up.json")
    monkeypatch.setattr(module, "PYTHON", tmp_path / ".venv" / "bin" / "python")
    return module


def test_too_little_disk_is_said_before_anything_is_made(install, tmp_path: Path, monkeypatch, capsys):
    for name in ("requirements.lock", "pyproject.toml"):
        (tmp_path / name).touch()
    monkeypatch.setattr(install.shutil, "disk_usage", lambda folder: SimpleNamespace(free=3.2e9))
    assert install.main() == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: the environment needs {install.DISK_NEEDED} GB of disk, but {tmp_path} has 3.2 GB")
    assert not (tmp_path / ".venv").exists()


def test_what_is_installed_already_counts_as_room(install, tmp_path: Path, monkeypatch):
    (tmp_path / ".venv").mkdir()
    with open(tmp_path / ".venv" / "large", "wb") as file:
        file.truncate(install.DISK_NEEDED * 10**9)  # sparse
    monkeypatch.setattr(install.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1e8))
    install.check_disk()


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        (["OSError: [Errno 28] No space left on device"], r"the disk is full; free about \d+ GB, and run"),
        (["WARNING: Retrying after NewConnectionError", "ERROR: No matching distribution"], "could not be reached"),
        (["Collecting torch", "ERROR: first", "ERROR: second"], "pip stopped with 'ERROR: first'"),
        (["Killed"], "pip stopped with 'Killed'"),
        ([], "pip stopped with 'no message'"),
    ],
)
def test_what_pip_says_becomes_a_sentence(output: list[str], sentence: str):
    assert re.search(sentence, script("install").readable(output))


@pytest.mark.parametrize("stamp", ["", "[]", '{"place": "elsewhere"'])
def test_a_damaged_stamp_counts_as_none(install, stamp: str, tmp_path: Path):
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    install.STAMP.write_text(stamp)
    assert not install.read_stamp()

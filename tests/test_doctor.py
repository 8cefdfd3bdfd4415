"""The doctor, and above all what it says when something is broken."""

import os
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from wris_lib import doctor
from wris_lib.backbones import checkpoints
from wris_lib.data import archives
from wris_lib.doctor import Finding

ANY = SpecifierSet("")


def only(check: doctor.Check) -> Finding:
    (finding,) = doctor.findings({"subject": check})
    return finding


@pytest.fixture
def fake_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Install a package called wris-fake, version 1.5, whose module has the given source."""

    def install(source: str) -> None:
        folder = tmp_path / "wris_fake-1.5.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: wris-fake\nVersion: 1.5\n")
        (tmp_path / "wris_fake.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "wris_fake", raising=False)

    return install


def test_a_line_ends_with_the_command_that_mends_it():
    assert str(Finding("OK", "cache", "/tmp/x")) == "[OK]   cache: /tmp/x"
    assert str(Finding("WARN", "disk", "small", "rm x")) == "[WARN] disk: small; mend it with: rm x"


def test_python_of_this_run_is_fine():
    assert only(doctor.check_python).level == "OK"


@pytest.mark.parametrize("version", [(3, 9, 18), (3, 14, 0)])
def test_other_pythons_fail(version: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "version_info", version)
    finding = only(doctor.check_python)
    assert finding.level == "FAIL" and "3.10 to 3.13" in finding.text and finding.mend == "PYTHON=python3.11 make setup"


def test_device_names_torch_and_cores(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    finding = only(doctor.check_device)
    assert finding.level == "OK" and torch.__version__ in finding.text and "CPU cores" in finding.text


def test_device_names_the_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    gpu = SimpleNamespace(name="Fast GPU", total_memory=24e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    assert "Fast GPU with 24 GB" in only(doctor.check_device).text


def test_a_gpu_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    finding = only(doctor.check_device)
    assert finding.level == "WARN" and "driver" in finding.text and finding.mend == "nvidia-smi"


def test_torch_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # makes `import torch` fail
    finding = only(doctor.check_device)
    assert finding.level == "FAIL" and "torch cannot be imported" in finding.text
    assert "pip install" in finding.mend and "torch==" in finding.mend


def test_each_required_package_has_a_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "import_module", lambda name: None)  # LAVIS alone takes ten seconds
    required = [Requirement(line) for line in metadata.requires("wris-lib")]
    wanted = [r.name.lower().replace("_", "-") for r in required if r.marker is None or r.marker.evaluate()]
    found = list(doctor.check_packages())
    assert [finding.subject for finding in found] == wanted
    assert {"torch", "open-clip-torch", "segment-anything", "salesforce-lavis", "spacy"} <= set(wanted)


def test_modules_have_the_names_that_are_imported():
    for name in ("pillow", "opencv-python-headless", "pycocotools", "open-clip-torch"):
        assert doctor.check_package(name, ANY) == Finding("OK", name, metadata.version(name))


def test_course_not_installed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "DISTRIBUTION", "wris-nowhere")
    finding = only(doctor.check_packages)
    assert finding.level == "FAIL" and "not installed" in finding.text and finding.mend == "make setup"


def test_conda_is_mended_by_conda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "conda-meta").mkdir()
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(doctor, "DISTRIBUTION", "wris-nowhere")
    assert only(doctor.check_packages).mend == "conda env update -f environment.yml"
    assert doctor.check_package("wris-nowhere", ANY).mend == "conda env update -f environment.yml"


def test_package_missing():
    finding = doctor.check_package("wris-nowhere", ANY)
    assert (finding.level, finding.text) == ("FAIL", "is missing")
    assert finding.mend.endswith("-r requirements.lock")


def test_package_that_only_a_part_needs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "OPTIONAL", {"wris-nowhere": "only a part needs it"})
    finding = doctor.check_package("wris-nowhere", ANY)
    assert (finding.level, finding.text) == ("WARN", "is missing, but only a part needs it")


def test_package_out_of_range(fake_package):
    fake_package("")
    finding = doctor.check_package("wris-fake", SpecifierSet(">=2"))
    assert (finding.level, finding.text) == ("FAIL", "1.5, but the course needs >=2")
    assert doctor.check_package("wris-fake", SpecifierSet(">=1,<2")) == Finding("OK", "wris-fake", "1.5")


def test_package_that_cannot_be_imported(fake_package):
    fake_package("raise RuntimeError('operator torchvision::nms does not exist\\nand so on')")
    finding = doctor.check_package("wris-fake", ANY)
    assert finding.level == "FAIL"
    assert finding.text == "1.5 cannot be imported (RuntimeError: operator torchvision::nms does not exist)"
    assert finding.mend.endswith("-m pip install --no-deps --force-reinstall wris-fake==1.5")


def test_package_whose_own_need_is_missing(fake_package):
    fake_package("import wris_nowhere")
    finding = doctor.check_package("wris-fake", ANY)
    assert finding.text == "1.5 needs wris_nowhere, which is missing" and finding.mend.endswith("requirements.lock")


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with good weights for every toy checkpoint."""
    monkeypatch.setattr(checkpoints, "WEIGHTS", tmp_path)
    for checkpoint in checkpoints.STACKS["toy"].checkpoints:
        (tmp_path / checkpoint.file).write_bytes(b"weights of " + checkpoint.file.encode())
        checkpoints.record_sha256(tmp_path / checkpoint.file)
    return tmp_path


def test_toy_weights_are_compared_with_their_hashes(weights: Path):
    assert [finding.level for finding in doctor.check_toy_weights()] == ["OK"] * 9
    (weights / "clip.safetensors").write_bytes(b"something else")
    (weights / "parser.msgpack").unlink()
    damaged, untouched, missing, *also_untouched = doctor.check_toy_weights()
    assert damaged.level == missing.level == "FAIL"
    assert {finding.level for finding in (untouched, *also_untouched)} == {"OK"}
    assert "damaged" in damaged.text and "missing" in missing.text
    assert damaged.mend == missing.mend == "git checkout -- wris_lib/weights"


def test_the_real_kernel_imports_the_course():
    assert only(doctor.check_kernel) == Finding("OK", "kernel", f"python3 starts in {sys.prefix}")


class FakeKernel:
    """A kernel that gives a prepared answer, manager and client at once."""

    def __init__(self, printed: str, content: dict[str, str]):
        self.printed, self.content = printed, content
        self.stopped = False

    def start(self, **options):
        return self, self

    def execute_interactive(self, code, timeout, output_hook):
        output_hook({"content": {"text": self.printed}})
        return {"content": self.content}

    def stop_channels(self):
        pass

    def shutdown_kernel(self, now):
        self.stopped = True


@pytest.mark.parametrize(
    ("kernel", "level", "text", "mend"),
    [
        (FakeKernel("/elsewhere\n", {"status": "ok"}), "WARN", "runs in /elsewhere", "make lab"),
        (
            FakeKernel("", {"status": "error", "ename": "ModuleNotFoundError"}),
            "FAIL",
            "cannot import wris_lib (ModuleNotFoundError)",
            "make setup",
        ),
    ],
)
def test_a_wrong_kernel(kernel: FakeKernel, level: str, text: str, mend: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("jupyter_client.manager.start_new_kernel", kernel.start)
    finding = only(doctor.check_kernel)
    assert finding.level == level and text in finding.text and finding.mend == mend
    assert kernel.stopped


def test_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=9e9, total=16e9))
    assert only(doctor.check_memory) == Finding("OK", "memory", "9.0 of 16.0 GB available")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1e9, total=16e9))
    finding = only(doctor.check_memory)
    assert finding.level == "WARN" and "1.0 of 16.0 GB" in finding.text and "ps aux" in finding.mend


@pytest.mark.parametrize(("free", "level"), [(0.5e9, "FAIL"), (5e9, "WARN"), (50e9, "OK")])
def test_disk(free: float, level: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    finding = only(doctor.check_disk)
    assert finding.level == level and (level == "OK" or "export WRIS_CACHE" in finding.mend)


def test_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WRIS_CACHE", str(tmp_path / "cache"))
    assert only(doctor.check_cache) == Finding("OK", "cache", str(tmp_path / "cache"))


@pytest.mark.parametrize("place", ["file/cache", "/proc/none/cache"])
@pytest.mark.parametrize("check", [doctor.check_disk, doctor.check_cache, doctor.check_paper_stack])
def test_where_there_can_be_no_cache_another_is_named(place: str, check, tmp_path: Path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("WRIS_CACHE", str(tmp_path / place))
    (finding,) = doctor.findings({"subject": check})
    assert finding.level == "FAIL" and f"cannot write to {tmp_path / place}" in finding.text
    assert "WRIS_CACHE" in finding.mend and ".venv" not in finding.mend


def test_paper_stack(monkeypatch: pytest.MonkeyPatch):
    found = {"a.pt": "ready", "b.pth": "missing", "c.pth": "unchecked"}
    monkeypatch.setattr(checkpoints, "paper_status", lambda: found)
    monkeypatch.setattr(checkpoints, "is_downloaded", lambda name: False)
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    ready, missing, unchecked, parser, *models = doctor.check_paper_stack()
    assert ready == Finding("OK", "paper stack a.pt", "ready")
    assert missing.level == "WARN" and missing.mend == "python -m wris_lib fetch paper"
    assert missing.text == "missing, but the toy stack does without"
    assert unchecked.level == "WARN" and unchecked.mend == missing.mend
    assert unchecked.text == "not yet compared with its source, but the toy stack does without"
    assert parser.level == "WARN" and parser.subject == "paper stack en_core_web_sm"
    assert parser.mend == "python -m spacy download en_core_web_sm"
    monkeypatch.setattr(doctor, "find_spec", lambda name: name == "en_core_web_sm")
    assert list(doctor.check_paper_stack())[3] == Finding("OK", "paper stack en_core_web_sm", "ready")
    lacking = "missing, but the toy stack does without"
    names = ["google/flan-t5-base", "facebook/mask2former-swin-large-coco-panoptic"]
    assert models == [
        Finding("WARN", f"paper stack {name}", lacking, f"huggingface-cli download {name}") for name in names
    ]


def test_models_of_the_hub_are_found_where_it_puts_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    paper = replace(checkpoints.STACKS["paper"], llm="some/model", mask2former=str(tmp_path))
    monkeypatch.setitem(checkpoints.STACKS, "paper", paper)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(checkpoints, "paper_status", dict)
    snapshot = tmp_path / "models--some--model" / "snapshots" / "abc"
    for path, text in ((snapshot / "config.json", "{}"), (snapshot.parent.parent / "refs" / "main", "abc")):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    assert [finding.level for finding in doctor.check_paper_stack()][-2:] == ["OK", "OK"]


@pytest.mark.parametrize(
    ("refcoco", "level", "text", "mend"),
    [
        (
            *("missing", "WARN", "refcoco missing, refcoco+ missing, but the toy stack does without"),
            "python -m wris_lib fetch paper --data refcoco",
        ),
        ("ready", "OK", "refcoco ready, refcoco+ missing", ""),
    ],
)
def test_paper_data(refcoco: str, level: str, text: str, mend: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(archives, "data_status", lambda: {"refcoco": refcoco, "refcoco+": "missing"})
    assert only(doctor.check_paper_data) == Finding(level, "paper stack data", text, mend)


def test_a_check_that_breaks_is_a_finding():
    def broken():
        raise OSError("the disk went away")

    assert only(broken).level == "FAIL" and "OSError: the disk went away" in only(broken).text


@pytest.mark.parametrize(("levels", "code"), [(["OK", "WARN"], 0), (["OK", "FAIL", "WARN"], 1)])
def test_exit_code_and_summary(levels, code: int, monkeypatch: pytest.MonkeyPatch, capsys):
    findings = [Finding(level, level.lower(), "text", "" if level == "OK" else "do it") for level in levels]
    monkeypatch.setattr(doctor, "CHECKS", {"all": lambda: iter(findings)})
    assert doctor.main() == code
    *lines, summary = capsys.readouterr().out.splitlines()
    assert len(lines) == len(levels) and all(line.endswith("do it") for line in lines if "[OK]" not in line)
    assert f"{levels.count('FAIL')} to mend" in summary


def test_everything_is_looked_at():
    machine = {"Python", "device", "packages", "kernel", "memory", "disk", "cache"}
    assert set(doctor.CHECKS) == machine | {"toy weights", "paper stack", "paper stack data"}


def test_runs_on_a_bare_python(tmp_path: Path):
    """Without one package, not even the course: each check still says something, and the exit code is 1."""
    bare = [sys._base_executable, "-I", "-S", "-c"]
    code = "import sys; sys.path.insert(0, sys.argv[1]); from wris_lib.doctor import main; sys.exit(main())"
    surroundings = os.environ | {"WRIS_CACHE": str(tmp_path)}
    done = subprocess.run([*bare, code, str(doctor.CHECKOUT)], capture_output=True, text=True, env=surroundings)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    lines = done.stdout.splitlines()[:-1]
    assert len(lines) >= len(doctor.CHECKS)
    assert all(line.startswith("[OK]") or "; mend it with: " in line for line in lines)
    assert any(line.startswith("[FAIL] device: torch cannot be imported") for line in lines)


def test_tables_name_only_packages_of_the_course():
    required = {Requirement(line).name.lower().replace("_", "-") for line in metadata.requires("wris-lib")}
    assert set(doctor.MODULES) | set(doctor.OPTIONAL) <= required


@pytest.mark.parametrize("name", sorted(set(doctor.MODULES) - set(doctor.OPTIONAL)))
def test_modules_of_another_name_are_found(name):
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        pytest.skip(f"this environment has no {name}")
    assert doctor.check_package(name, ANY).level == "OK"

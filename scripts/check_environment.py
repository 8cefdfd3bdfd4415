"""Make the environment that `conda env create -f environment.yml` would make, and check it.

conda hands the file's pip section to `pip install -U -r`, in the file's folder; so does this, in a fresh Python 3.11
environment in a temporary folder, which is removed in the end. Then `pip check` must be content, the doctor too, and
some tests that call each upstream package must pass. Run it with Python 3.11; it needs nothing else.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = [
    "tests/backbones/test_clip.py",
    "tests/backbones/test_itm.py",
    "tests/backbones/test_sam.py",
    "tests/data",
    "tests/test_methods.py",
]


def main() -> int:
    if sys.version_info[:2] != (3, 11):
        print("error: environment.yml asks for Python 3.11; run this script with that.", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="wris-environment-") as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text("\n".join(pip_section((ROOT / "environment.yml").read_text())))
        subprocess.run([sys.executable, "-m", "venv", f"{folder}/env"], check=True)
        python = f"{folder}/env/bin/python"
        # Downloads are put aside in TMPDIR: the default one may be a small memory disk.
        quiet = os.environ | {"TMPDIR": folder, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "WRIS_CACHE": f"{folder}/cache"}

        def run(*command: str, **options) -> subprocess.CompletedProcess:
            return subprocess.run([python, "-m", *command], cwd=ROOT, env=quiet, **options)

        run("pip", "install", "--quiet", "-U", "--exists-action=b", "-r", str(requirements), check=True)
        complaints = unexpected(run("pip", "check", capture_output=True, text=True).stdout)
        print("\n".join(complaints) or "pip check is content.", flush=True)
        doctor = run("wris_lib", "doctor")
        tests = run("pytest", *TESTS)
        return int(bool(complaints or doctor.returncode or tests.returncode))


def pip_section(environment: str) -> list[str]:
    """The lines of environment.yml's pip section, which is the last one, without their comments."""
    _, _, section = environment.partition("- pip:\n")
    lines = [re.sub(r"\s+#.*", "", line).strip() for line in section.splitlines()]
    requirements = [line.removeprefix("- ") for line in lines if line]
    if not requirements or not all(line.startswith("- ") for line in lines if line):
        raise ValueError("environment.yml has no pip section at its end")
    return requirements


def unexpected(complaints: str) -> list[str]:
    """What `pip check` says, but for decord, whose wheel has an old name for a platform that it does support."""
    lines = [line for line in complaints.splitlines() if line and not line.startswith("No broken requirements")]
    return [line for line in lines if not re.fullmatch(r"decord \S+ is not supported on this platform", line)]


if __name__ == "__main__":
    sys.exit(main())

from wris_lib import sources as module
from wris_lib.sources import imported, sources

CODE = """
import os, wris_lib.show
from wris_lib import data
from wris_lib.methods import METHODS, clip_sam
from elsewhere import wris_lib
def f():
    from wris_lib.methods.ppt.vision import visual_features
    from wris_lib.backbones.language import __file__ as language_code
"""


def test_imports_are_found():
    assert imported(CODE) == {
        *("wris_lib.show", "wris_lib.data", "wris_lib.methods", "wris_lib.methods.clip_sam"),
        *("wris_lib.methods.ppt.vision", "wris_lib.backbones.language"),
    }


def test_modules_are_followed_and_data_beside_them_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PACKAGE", tmp_path / "wris_lib")
    imported.cache_clear()
    files = {
        "wris_lib/__init__.py": "",
        "wris_lib/page.html": "",
        "wris_lib/low.py": "from wris_lib.one import start",  # round and round
        "wris_lib/one/__init__.py": "from wris_lib.one.start import f",
        "wris_lib/one/start.py": "from wris_lib.two.shared import g",
        "wris_lib/one/unused.py": "",
        "wris_lib/one/prompt.txt": "",
        "wris_lib/one/README.md": "",
        "wris_lib/two/__init__.py": "import wris_lib.two.big",
        "wris_lib/two/big.py": "",
        "wris_lib/two/shared.py": "import wris_lib.low",
        "wris_lib/two/drawings/cat/1.svg": "",
        "wris_lib/two/three/__init__.py": "",
        "wris_lib/two/three/config.json": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = sources(tmp_path / "wris_lib" / "one" / "__init__.py")
    assert [path.relative_to(tmp_path / "wris_lib").as_posix() for path in found] == [
        *("low.py", "one/__init__.py", "one/prompt.txt", "one/start.py", "two/drawings/cat/1.svg", "two/shared.py"),
    ]
    imported.cache_clear()

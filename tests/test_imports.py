"""Imports run one way, so that whoever reads a module need not know what is built upon it."""

from wris_lib.sources import PACKAGE, imported

# Rooms of the house, from the ground up. Each may import from those named before it, and within itself.
ROOMS = (
    *("errors", "files", "sources", "download", "data", "backbones", "train", "evaluate", "methods"),
    *("report", "answers", "examples", "ablation_figure", "show"),  # what becomes of predictions
    *("course", "contestants", "questions", "cost", "comparison_figures", "page", "benchmark"),
    *("pretrain", "studies", "fetch", "doctor"),
    *(
        "checking",
        "exercises",
        "exercises_sam",
        "exercises_ppt",
        "exercises_curriculum",
        "exercises_pcnet",
        "exercises_iterprime",
    ),
    *("exercises_measured", "exercises_compare"),
    *("widgets", "widgets_ppt", "widgets_curriculum", "widgets_pcnet", "widgets_iterprime", "widgets_compare"),
    "__main__",
)


def test_imports_run_one_way():
    places = {room: number for number, room in enumerate(ROOMS)}
    seen = set()
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room == "__init__":  # the package's own face
            continue
        seen.add(room)
        modules = imported(path.read_text(encoding="utf-8")) - {"wris_lib"}
        wrong = [used for used in {name.split(".")[1] for name in modules} if places[used] > places[room]]
        assert not wrong, f"{path.name} imports {wrong}; {room} stands below them, see ROOMS"
    assert seen == set(ROOMS)

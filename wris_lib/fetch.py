"""What `python -m wris_lib fetch` does: say what is lacking and where it comes from, ask, and bring it."""

from wris_lib.backbones.checkpoints import STACKS, fetch_checkpoint, paper_status
from wris_lib.files import cache_dir


def fetch_paper(ask: bool = True) -> None:
    """Bring what is lacking of the paper stack into the cache, having said what that is.

    Args:
        ask: wait for a yes on the keyboard first.

    Raises:
        WrisError: no source of a file worked; the cache is read-only or full. What has arrived is kept.
    """
    status = paper_status()
    lacking = [c for c in STACKS["paper"].checkpoints if status[c.file] != "ready"]
    folder = cache_dir() / "paper"
    if not lacking:
        print(f"The paper stack is complete in {folder}.")
        return
    print(f"To be fetched into {folder}:")
    for checkpoint in lacking:
        print(f"  {checkpoint.file}: about {checkpoint.megabytes} MB, {checkpoint.licence} licence")
        print(f"    from {checkpoint.urls[0]}")
        if status[checkpoint.file] == "unchecked":
            print("    unless the file that is there turns out to be the same")
    if ask and not _agreed("Fetch? [y/N] "):
        print("Nothing was fetched.")
        return
    for checkpoint in lacking:
        fetch_checkpoint(checkpoint)
    print(f"The paper stack is complete in {folder}.")


def _agreed(question: str) -> bool:
    try:
        return input(question).strip().lower() in {"y", "yes"}
    except EOFError:  # nobody sits at the keyboard
        print()
        return False

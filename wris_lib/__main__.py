"""`python -m wris_lib`: everything of the course that is done from the command line.

Each command imports what it needs when it is called: `--help` answers at once, and the doctor runs where torch is
broken.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from pkgutil import resolve_name

from wris_lib.errors import WrisError

DESCRIPTION = """\
Weakly-supervised referring image segmentation, to read and to run.

  python -m wris_lib segment photo.jpg "the dog on the left" --out overlay.png
"""
STACK_HELP = 'models to use: "toy", which come with the course (default), or "paper", see `fetch`'
REAL_DATA = ("refcoco", "refcoco+", "refcocog")
STUDIES = {  # of which methods, and the function in `wris_lib.studies`
    "ablation": {"ppt": "ppt:ablation", "pcnet": "pcnet:ablation"},
    "study": {"ppt": "ppt:study"},
    "pseudo_labels": {"ppt": "ppt_labels:pseudo_labels"},
    "selections": {"ppt": "ppt_labels:selections"},
    "features": {"ppt": "ppt_features:features"},
    "cache_speed": {"ppt": "ppt:cache_speed"},
}
SPLITS = "toyobjects:val toyref:val toyref+:val toyrefg:val"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code: 0 done, 1 the doctor found a fault, 2 the user can mend it, 130 interrupted."""
    options = build_parser().parse_args(arguments)
    try:
        return options.command(options) or 0
    except WrisError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(
            f"error: the package {error.name} is missing from {sys.prefix}; use the course's environment "
            "(.venv/bin/python -m wris_lib …), and make it with `make setup`.",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; what was finished is kept.", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m wris_lib",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(command: Callable[[argparse.Namespace], int | None], help: str) -> argparse.ArgumentParser:
        name = command.__name__
        added = commands.add_parser(name, help=help, description=command.__doc__)
        added.set_defaults(command=command)
        return added

    add(doctor, "say what works here, and how to mend the rest")

    fetched = add(fetch, "download the papers' checkpoints and data")
    fetched.add_argument("stack", choices=["paper"], help="the papers' CLIP, SAM and ALBEF, with their hashes checked")
    real = ", ".join(REAL_DATA)
    fetched.add_argument("--data", nargs="+", default=[], choices=REAL_DATA, metavar="DATASET", help=f"also {real}")
    fetched.add_argument(
        "--images", type=Path, metavar="FOLDER", help="COCO's train2014, if you have it (else fetched, 13.5 GB)"
    )
    fetched.add_argument("--yes", action="store_true", help="do not ask before downloading")

    segmented = add(segment, "find the object that an expression refers to")
    segmented.add_argument("image", metavar="IMAGE", help="a picture file")
    segmented.add_argument("expression", metavar="EXPRESSION", help='such as "the man in the green shirt"')
    segmented.add_argument("--out", default="overlay.png", metavar="FILE", help="picture to write (overlay.png)")
    segmented.add_argument("--method", default="clip_sam", help="method to use (clip_sam)")
    segmented.add_argument("--stack", help=STACK_HELP)

    measured = add(benchmark, "measure methods on splits")
    who = measured.add_mutually_exclusive_group(required=True)
    who.add_argument("--method", nargs="+", metavar="NAME", help='methods, variants ("clip_sam plain") or "sam box"')
    who.add_argument("--all", action="store_true", help="every method and variant, and what they cost")
    measured.add_argument("--data", nargs="+", metavar="SPLIT", help=f"such as {SPLITS} (with --all: all toy splits)")
    measured.add_argument(
        "--name", help="writes results/NAME.json, .md and .png (the first method's name; with --all: benchmark)"
    )
    measured.add_argument(
        "--limit", type=positive, metavar="N", help="at least N expressions of a split, drawn (all; with --all: 500)"
    )
    measured.add_argument("--html", type=Path, metavar="FILE", help="also write a page with examples and disagreements")
    measured.add_argument("--seed", type=int, default=0, help="of that draw and of the intervals (0)")
    measured.add_argument("--stack", help=STACK_HELP)

    learned = add(train, "train a method without any mask")
    learned.add_argument("method", choices=["ppt", "tris", "pcnet"])
    learned.add_argument("--data", metavar="SPLIT", help="sentences (toyref:train, for pcnet also toyrefg:train)")
    learned.add_argument("--objects", type=Path, metavar="FOLDER", help="ppt: object-centric pictures (ToyObjects)")
    learned.add_argument("--steps", type=positive, metavar="N", help="optimiser steps (the usual number)")
    learned.add_argument("--seed", type=natural, help="of all that is drawn (0); of a study only this one")
    learned.add_argument("--folder", type=Path, help="where checkpoints are kept (in the cache)")
    learned.add_argument("--stack", help=STACK_HELP)
    studies = learned.add_mutually_exclusive_group()
    studies.add_argument("--ablation", action="store_true", help="instead: the paper's study of components")
    studies.add_argument("--study", action="store_true", help="instead, ppt: K, M and the loss, one change at a time")
    studies.add_argument("--pseudo-labels", action="store_true", help="instead, ppt: how good the pseudo-labels are")
    studies.add_argument("--selections", action="store_true", help="instead, ppt: how right Select is, round by round")
    studies.add_argument("--features", action="store_true", help="instead, ppt: what CLIP's features tell of a scene")
    studies.add_argument("--cache-speed", action="store_true", help="instead, ppt: an epoch with and without the cache")

    studied = add(study, "redo a paper's studies of a method that needs no training")
    studied.add_argument("method", choices=["iterprime"])
    studied.add_argument("which", choices=["ablation", "speed"], help="the paper's tables, or what batching saves")

    trained = add(pretrain, "train a toy model from scratch")
    trained.add_argument("model", choices=["clip", "sam", "parser", "t5", "albef"])
    trained.add_argument("--steps", type=positive, metavar="N", help="optimiser steps (as in the model card)")
    trained.add_argument("--folder", type=Path, metavar="FOLDER", help="for checkpoints and trials (in the cache)")

    made = add(toyworld, "make the toy datasets")
    made.add_argument(
        "--out", type=Path, metavar="FOLDER", help="a new folder for them (in the cache, where the course looks)"
    )
    return parser


def doctor(options: argparse.Namespace) -> int:
    """Check Python, packages, weights, notebook kernel, memory, disk and cache. Exits with 1 if something failed."""
    from wris_lib.doctor import main

    return main()


def fetch(options: argparse.Namespace) -> None:
    """Say what is lacking of the paper stack, and of real datasets, and download it into the cache. A broken download
    is continued; what is there already is not fetched again."""
    from wris_lib.fetch import fetch_paper

    if options.images and not options.data:
        raise WrisError("--images says where the pictures of a dataset are; add --data and its name, such as refcoco.")
    fetch_paper(options.data, options.images, ask=not options.yes)


def segment(options: argparse.Namespace) -> None:
    """Segment the object that an expression refers to, and write the image with its mask. The toy stack knows only
    the toy world; for photographs take --stack paper."""
    from wris_lib import show
    from wris_lib.methods import segment

    prediction = segment(options.image, options.expression, method=options.method, stack=options.stack)
    show.overlay(options.image, prediction, options.expression).save(options.out)
    print(f"{options.out}: the mask covers {prediction.mask.mean():.1%} of the image, score {prediction.score:.2f}")


def benchmark(options: argparse.Namespace) -> None:
    """Measure methods on splits, and write table and picture into results/. A run that was stopped goes on where it
    was; processes started with the same command, such as by accelerate, divide the work. With --limit the files are
    named after it, so that a trial does not replace the full figures."""
    from wris_lib import report
    from wris_lib.benchmark import LIMIT, TOY_SPLITS, run

    if not (options.all or options.data):
        raise WrisError("nothing says what to measure on; add --data and a split, such as toyref:val.")
    limited = f"_limit{options.limit}" if options.limit else ""
    name = options.name or ("benchmark" if options.all else options.method[0].split(" ")[0]) + limited
    limit = options.limit or (LIMIT if options.all else None)
    splits = options.data or TOY_SPLITS
    results = run(options.method, splits, name, limit, options.seed, options.stack, html=options.html)
    if results is not None:
        print(report.table(results))


def train(options: argparse.Namespace) -> None:
    """Train a method on expressions without masks. A run that was stopped goes on where it was; a study's trainings
    are shared by as many processes as are started with the same command."""
    from wris_lib.backbones.checkpoints import get_stack
    from wris_lib.studies.common import SEEDS

    method = options.method
    chosen = next((name for name in STUDIES if getattr(options, name)), None)
    if chosen and method not in STUDIES[chosen]:
        raise WrisError(f"--{chosen.replace('_', '-')} is a study of {' and '.join(STUDIES[chosen])}, not of {method}.")
    if chosen:
        over_seeds = chosen in ("ablation", "study", "selections")
        unused = ["data", "objects", "folder", "stack", *([] if over_seeds else ["steps", "seed"])]
        if given := [f"--{name}" for name in unused if getattr(options, name) is not None]:
            raise WrisError(f"--{chosen.replace('_', '-')} has settings of its own; leave out {', '.join(given)}.")
        study = resolve_name(f"wris_lib.studies.{STUDIES[chosen][method]}")
        if over_seeds:
            study(options.steps, SEEDS if options.seed is None else (options.seed,))
        else:
            study()
        return
    stack = get_stack(options.stack).name
    if method == "ppt":
        from wris_lib.methods.ppt import run

        data = options.data or run.TOY_DATA
        run.main(stack, data, options.objects, options.steps, options.seed or 0, options.folder)
    else:
        from wris_lib.methods.pcnet import run

        if options.objects:
            raise WrisError(f"{method} learns nothing from object-centric pictures; leave out --objects.")
        run.main(method, stack, options.data, options.steps, options.seed or 0, options.folder)


def study(options: argparse.Namespace) -> None:
    """Measure what the paper measured of a method that needs no training, and write the figures into results/. A
    study that was stopped goes on where it was."""
    resolve_name(f"wris_lib.studies.{options.method}:{options.which}")()


def pretrain(options: argparse.Namespace) -> None:
    """Train a toy model from scratch. A run that was stopped goes on at its last checkpoint; the parser, which takes
    minutes, begins anew."""
    main = resolve_name(f"wris_lib.pretrain.{options.model}:main")
    given = {"steps": options.steps, "folder": options.folder}
    main(**{name: value for name, value in given.items() if value is not None})


def toyworld(options: argparse.Namespace) -> None:
    """Make ToyRef, ToyRef+, ToyRefg, ToyCut and ToyObjects: pictures, outlines and expressions in RefCOCO's format."""
    from wris_lib.data.toyworld import build
    from wris_lib.files import atomic_folder

    if options.out is None:
        print(build.ensure())
        return
    with atomic_folder(options.out) as folder:
        if folder is None:
            raise WrisError(f"{options.out} exists already; name a new folder.")
        build.write_world(folder)
    print(options.out)


def natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected 0 or a positive number, got {text!r}")
    return int(text)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())

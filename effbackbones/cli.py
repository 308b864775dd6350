"""The command `effb`."""

import argparse
import fnmatch
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from effbackbones import __version__
from effbackbones.assets import list_recipes
from effbackbones.models._zoo import ZOO, Published

EXAMPLES = {
    "ls": """
  effb ls                             models with parameters, GMACs and published accuracy, then recipes
  effb ls models 'uniformer_small*'   models of that name
  effb ls recipes                     recipes""",
    "show": """
  effb show quickstart                             every key, its value and where it comes from
  effb show in1k/uniformer_small optim.lr=5e-4     the same with an override""",
    "train": """
  effb train quickstart                                        the images that ship with the repository, minutes on CPU
  effb train in1k/uniformer_small data.root=/data/imagenet     8 GPUs, as published
  effb train quickstart trainer.epochs=2 run.dir=runs/short    any key of `effb show` can be set
  effb train runs/quickstart                                   go on where that run stopped""",
    "plan": """
  effb plan in1k/uniformer_small --devices 8 data.root=/data/imagenet   memory by DDP and FSDP, batch, rate, steps
  effb plan in1k/gc_vit_large --devices 32 --images 1281167 trainer.precision=bf16
  effb plan in1k/uniformer_small --devices 64 --dry-run                 and a step as one of 64 ranks, on a CPU""",
    "eval": """
  effb eval runs/quickstart                                    the best checkpoint of a run
  effb eval in1k/uniformer_small model.checkpoint=uniformer_small_in1k.pth data.root=/data/imagenet""",
    "predict": """
  effb predict shoe.png --run runs/quickstart                  top-5 classes by a run's best checkpoint
  effb predict photos/ --run runs/scenes/mask_rcnn --out seen  boxes and masks, or segmentations, in pictures
  effb predict *.jpg --model uniformer_small --checkpoint uniformer_small_in1k.pth""",
    "data": """
  effb data scenes --out datasets/scenes                       1,000 small scenes in the layouts of COCO and ADE20K
  effb data check /data/imagenet --workers 16                  what a set holds, and every file that cannot be read""",
    "export": """
  effb export onnx runs/quickstart --out quickstart.onnx       the best checkpoint of a run, for any batch
  effb export torch uniformer_small --checkpoint uniformer_small_in1k.pth --out uniformer_small.pt2
  effb export onnx uniformer_small --checkpoint uniformer_small_in1k.pth --dense --size 512 --out backbone.onnx
  effb export mm runs/scenes/mask_rcnn --out exported          config.py and weights.pth for mm's own tools""",
    "bench": """
  effb bench uniformer_small --vs attention=plain                    a model, and the same with plain attention
  effb bench uniformer_small --vs resnet50 --batch 1 64 --device cuda --dtype bfloat16 --out speed.json
  effb bench uniformer_small --vs compile=yes --mode inference train --size 224 256x320
  effb bench uniformer_small --vs uniformer_small                    how far this machine's noise alone goes
  effb bench op:token_merging --vs ops=reference --at-least 1        exit code 1 where it is slower than its reference
  effb bench data in1k/uniformer_small data.root=/data/imagenet      the loader alone; see effb bench data --help
  effb bench suite --out suite.json                                  every family; see effb bench suite --help""",
    "doctor": """
  effb doctor                         versions, devices, what works here of attention and of mm, and why not""",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `effb`; return the exit code.

    That is 0, 1 where a problem was found, 2 where the input was bad, 130 after Ctrl-C, and 143 where another signal
    stopped a run, which then goes on with the same command.
    """
    args = _parser().parse_args(argv)
    try:
        return COMMANDS[args.command](args)
    except KeyboardInterrupt:
        return 130
    except _input_errors() as error:
        print(f"effb {args.command}: {error}", file=sys.stderr)
        return 2
    except _stopped() as stop:
        return stop.code


def _input_errors() -> tuple[type[Exception], ...]:
    from lightning.fabric.utilities.exceptions import MisconfigurationException  # a device that is not there

    from effbackbones.bench import BenchError
    from effbackbones.checkpoint import CheckpointError
    from effbackbones.config import RecipeError
    from effbackbones.data import DataError
    from effbackbones.export import ExportError
    from effbackbones.train.callbacks.finite import NonFiniteError
    from effbackbones.train.callbacks.memory import MemoryLimitError

    bad_settings = NonFiniteError, MemoryLimitError, MisconfigurationException
    return BenchError, RecipeError, CheckpointError, DataError, ExportError, OSError, *bad_settings


def _stopped() -> type[Any]:
    from effbackbones.train.callbacks.signals import StoppedError

    return StoppedError


BENCH_DATA, BENCH_SUITE = "bench data", "bench suite"


class _Parser(argparse.ArgumentParser):
    """Takes `bench data` and `bench suite` as one command each.

    Attributes:
        mixes: Whether options may stand between positional arguments.
    """

    mixes = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self.mixes:
            self.mixes = False  # what follows comes back here
            return self.parse_known_intermixed_args(args, namespace)
        args = list(sys.argv[1:] if args is None else args)
        if " ".join(args[:2]) in (BENCH_DATA, BENCH_SUITE):
            args[:2] = [" ".join(args[:2])]
        return super().parse_known_args(args, namespace)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("effb", description="Efficient vision backbones: list, train, evaluate, predict.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> _Parser:
        return commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=f"examples:{EXAMPLES[name]}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    overrides: dict[str, Any] = {"nargs": "*", "metavar": "KEY=VALUE", "help": "overrides, such as optim.lr=5e-4"}
    ls = command("ls", "list models and recipes")
    ls.add_argument("what", nargs="?", choices=["all", "models", "recipes"], default="all", help="default: all")
    ls.add_argument("pattern", nargs="?", default="*", help="names to list, such as '*small*'")
    show = command("show", "show a recipe with the origin of every value")
    show.add_argument("recipe", help="name or path of a recipe, or a run folder")
    show.add_argument("overrides", **overrides)
    train = command("train", "train a recipe, or go on with a run")
    train.add_argument("recipe", help="name or path of a recipe, or a run folder")
    train.add_argument("overrides", **overrides)
    plan = command("plan", "say what a recipe takes of each device, and what to look at before it runs")
    plan.mixes = True
    plan.add_argument("recipe", help="name or path of a recipe, or a run folder")
    plan.add_argument("overrides", **overrides)
    plan.add_argument("--devices", type=_positive, default=1, metavar="N", help="over all machines; default: 1")
    plan.add_argument(
        "--images", type=_positive, metavar="N", help="training images, where the dataset is not there to be counted"
    )
    plan.add_argument(
        "--dry-run", action="store_true", help="also build, wrap and step as one of the N ranks, on a CPU, with noise"
    )
    evaluate = command("eval", "evaluate a run or a checkpoint")
    evaluate.add_argument("target", help="run folder, or name or path of a recipe")
    evaluate.add_argument("overrides", **overrides)
    predict = command("predict", "name what images show")
    predict.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    source = predict.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", help="run folder")
    source.add_argument("--model", help="registered model, with --checkpoint")
    predict.add_argument("--checkpoint", help="ImageNet-1K weights of --model")
    predict.add_argument(
        "--out", metavar="DIR", help="where pictures of dense tasks go; default: predictions in the run folder"
    )
    data = command("data", "make and check datasets").add_subparsers(dest="what", required=True, metavar="WHAT")
    scenes = data.add_parser("scenes", help="scenes of the images that ship, for detection and segmentation")
    scenes.add_argument("--out", required=True, metavar="DIR", help="a new folder, for coco/ and ade20k/")
    scenes.add_argument("--train", type=_positive, default=800, metavar="N", help="training scenes; default: 800")
    scenes.add_argument("--val", type=_positive, default=200, metavar="N", help="evaluation scenes; default: 200")
    scenes.add_argument("--size", type=_size, default=(192, 256), help="height x width; default: 192x256")
    scenes.add_argument("--seed", type=int, default=0, help="default: 0")
    check = data.add_parser("check", help="read every image of a set for classification; say what is in it, and wrong")
    check.add_argument("root", help="what data.root is: class folders, tar shards, or what `datasets` saved to disk")
    workers = min(4, os.cpu_count() or 1)
    check.add_argument(
        "--workers", type=_positive, default=workers, metavar="N", help=f"processes that read; default here: {workers}"
    )
    export = command("export", "write a model or a run for other tools").add_subparsers(
        dest="what", required=True, metavar="WHAT"
    )
    for form, what in (("torch", "a program of torch.export"), ("onnx", "an ONNX file")):
        one = export.add_parser(form, help=f"{what}, of any batch, checked against eager execution")
        one.add_argument("target", help="run folder of a classifier, or name of a model")
        one.add_argument("--out", required=True, metavar="FILE")
        one.add_argument("--checkpoint", metavar="FILE", help="weights of a named model; without, random ones")
        one.add_argument("--size", type=_size, help="224, or 224x320 for height x width; default: the model's own")
        one.add_argument("--dense", action="store_true", help="of a named model: four maps in dense mode, no logits")
        one.add_argument("--no-fuse", action="store_true", help="leave norms, scales and residuals as layers")
    mm = export.add_parser("mm", help="an mm config and weights of a run of a dense task")
    mm.add_argument("run", help="run folder")
    mm.add_argument("--out", required=True, metavar="DIR", help="a folder, for config.py and weights.pth")
    bench = command("bench", "measure speed and memory of models and operators, side by side")
    bench.add_argument("names", nargs="+", metavar="NAME", help="a model of timm's registry, or op:OPERATOR")
    bench.add_argument(
        "--vs",
        nargs="+",
        default=[],
        metavar="OTHER",
        help="what each is compared with: another NAME, or settings, joined by commas, of the same one: attention="
        "plain (or auto, sdpa, triton, xformers), ops=reference (auto, torch), dtype=bfloat16 (float16, float32), "
        "compile=yes (no), channels_last=yes (no), fused=yes (no), onnx=yes (no); or a NAME with settings: "
        "resnet50,dtype=bfloat16",
    )
    bench.add_argument(
        "--mode",
        nargs="+",
        choices=["inference", "train"],
        default=["inference"],
        help="forward pass, or forward pass, loss and backward pass without an optimizer; default: inference",
    )
    bench.add_argument(
        "--batch", nargs="+", type=_positive, default=[1], metavar="N", help="images of a call; default: 1"
    )
    bench.add_argument(
        "--size", nargs="+", type=_size, default=[], help="224, or 224x320 for height x width; default: the model's own"
    )
    bench.add_argument(
        "--dtype",
        nargs="+",
        choices=["float32", "bfloat16", "float16"],
        default=["float32"],
        help="that of autocast; default: float32, which is none",
    )
    bench.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    bench.add_argument("--channels-last", action="store_true", help="store weights and images channels last")
    bench.add_argument("--compile", action="store_true", help="measure what torch.compile makes of it")
    bench.add_argument("--dense", action="store_true", help="measure backbones of dense tasks: feature maps out")
    bench.add_argument("--threads", type=_positive, metavar="N", help="CPU threads; default: torch's")
    bench.add_argument(
        "--warmup", type=_positive, default=3, metavar="N", help="calls before the first sample; default: 3"
    )
    length = bench.add_mutually_exclusive_group()
    length.add_argument("--repeats", type=_positive, metavar="N", help="rounds, of two samples each")
    length.add_argument("--min-time", type=float, default=2.0, metavar="S", help="seconds to measure each; default: 2")
    bench.add_argument(
        "--at-least", type=float, metavar="RATIO", help="exit with code 1 where a ratio is below this, or a case failed"
    )
    bench.add_argument(
        "--out", metavar="FILE.json", help="write everything there: samples, settings, machine, versions"
    )
    text = "measure the loader of a recipe alone: images/s by number of workers, and what an image costs"
    bench_data = commands.add_parser(BENCH_DATA, description=text)  # beside bench, whose arguments are names of models
    bench_data.set_defaults(command="bench")
    bench_data.mixes = True
    bench_data.add_argument("recipe", help="name or path of a recipe, or a run folder")
    bench_data.add_argument("overrides", **overrides)
    bench_data.add_argument(
        "--workers",
        nargs="+",
        type=_not_negative,
        metavar="N",
        help="numbers of loader processes; default: 0, 1, 2, 4 and so on up to the cores, and the recipe's",
    )
    bench_data.add_argument(
        "--min-time", type=float, default=3.0, metavar="S", help="seconds to measure each; default: 3"
    )
    bench_data.add_argument("--out", metavar="FILE.json", help="write everything there: samples, machine, versions")
    text = (
        "measure every family against its reference path, compiled, fused and in another precision; goes on where it "
    )
    text += "was stopped; writes FILE.json after every pair, and FILE.md (tables) and FILE.png at the end"
    suite = commands.add_parser(BENCH_SUITE, description=text)
    suite.set_defaults(command="bench")
    suite.add_argument("--out", required=True, metavar="FILE.json", help="the results; gone on with where it exists")
    suite.add_argument(
        "--only", nargs="+", default=[], metavar="REGEX", help="measure the pairs alone that one of these is found in"
    )
    suite.add_argument("--list", action="store_true", help="print the names of the pairs to measure, and stop")
    suite.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    suite.add_argument("--threads", type=_positive, metavar="N", help="CPU threads; default: torch's")
    suite.add_argument("--warmup", type=_positive, default=1, metavar="N", help="calls before the first sample")
    suite.add_argument("--min-time", type=float, default=2.0, metavar="S", help="seconds to measure each; default: 2")
    command("doctor", "report versions, devices, attention backends and mmcv's operators")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def _not_negative(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def _size(text: str) -> tuple[int, int]:
    height, cross, width = text.partition("x")
    return _positive(height), _positive(width if cross else height)


def ls(args: argparse.Namespace) -> int:
    models = [] if args.what == "recipes" else [row for row in ZOO if fnmatch.fnmatch(row.model, args.pattern)]
    recipes = {} if args.what == "models" else list_recipes()
    recipes = {name: path for name, path in recipes.items() if fnmatch.fnmatch(name, args.pattern)}
    if not models and not recipes:
        print(f"effb ls: nothing is named {args.pattern!r}; `effb ls` lists all there is", file=sys.stderr)
        return 2
    if models:
        _print_table(("Model", "Size", "Parameters", "GMACs", "Top-1", "Source", "Note"), map(_zoo_cells, models))
    if models and recipes:
        print()
    if recipes:
        _print_table(("Recipe", "File"), [(name, str(path)) for name, path in recipes.items()])
    return 0


def show(args: argparse.Namespace) -> int:
    from effbackbones.config import explain
    from effbackbones.train.run import load_target

    rows = [
        (key, value if isinstance(value, str) else json.dumps(value), origin, meaning)  # as in a recipe: null, not None
        for key, value, origin, meaning in explain(load_target(args.recipe, args.overrides))
    ]
    _print_table(("Key", "Value", "Origin", "Meaning"), rows)
    return 0


def train(args: argparse.Namespace) -> int:
    from effbackbones.train.run import load_target
    from effbackbones.train.run import train as run_training

    run_training(load_target(args.recipe, args.overrides))
    return 0


def plan(args: argparse.Namespace) -> int:
    from effbackbones.plan import make_plan
    from effbackbones.train.dry_run import dry_run
    from effbackbones.train.run import load_target

    loaded = load_target(args.recipe, args.overrides)
    print(make_plan(loaded, args.devices, args.images))
    if args.dry_run:
        print(f"{'Dry run':14} {dry_run(loaded, args.devices)}")
    return 0


def evaluate(args: argparse.Namespace) -> int:
    from effbackbones.train.run import evaluate as run_evaluation

    metrics = run_evaluation(args.target, args.overrides)
    shares = [f"{name} {100 * value:.2f}%" for name, value in metrics.items() if "loss" not in name]
    print("  ".join(shares + [f"{name} {value:.4f}" for name, value in metrics.items() if "loss" in name]))
    return 0


def predict(args: argparse.Namespace) -> int:
    from effbackbones.config import RecipeError
    from effbackbones.predict import Predictor, image_files
    from effbackbones.train.run import load_target, needing_mm

    if bool(args.model) != bool(args.checkpoint):
        raise RecipeError("--model and --checkpoint go together: a registered model, a file of its ImageNet-1K weights")
    files = image_files(args.images)
    task = load_target(args.run).recipe.task if args.run and Path(args.run).is_dir() else "classification"
    if task != "classification":
        with needing_mm(f"task: {task}"):
            from effbackbones.predict_dense import predict_pictures

        skipped = 0
        for number, (line, drawn) in enumerate(predict_pictures(args.run, files, args.out), 1):
            print(f"{number}/{len(files)}  {line}", flush=True)
            skipped += not drawn
        return 1 if skipped else 0
    if args.out:
        raise RecipeError("--out: classification draws no pictures; leave it out")
    predictor = Predictor.from_run(args.run) if args.run else Predictor.from_model(args.model, args.checkpoint)
    paths = [path for path, _ in files]
    for path, classes in zip(paths, predictor(paths), strict=True):
        print(path)
        for name, probability in classes:
            print(f"  {100 * probability:5.1f}%  {name}")
    return 0


def data(args: argparse.Namespace) -> int:
    if args.what == "check":
        from effbackbones.data.check import check_dataset

        findings = check_dataset(Path(args.root), args.workers, _progress("images"))
        print("\n".join(findings.lines()))
        return 1 if findings.problems else 0
    from effbackbones.data.scenes import make_scenes

    out = Path(args.out)
    make_scenes(out, train=args.train, val=args.val, size=args.size, seed=args.seed, progress=_progress("scenes"))
    print(f"detection     data.root={out / 'coco'}\nsegmentation  data.root={out / 'ade20k'}")
    return 0


def _progress(unit: str) -> Callable[[int, int], None]:
    """Return what prints how much is done: over and over on a terminal, else every 10 seconds and at the end."""
    shown, terminal = [0.0], sys.stdout.isatty()

    def progress(done: int, total: int) -> None:
        if terminal or done == total or time.monotonic() - shown[0] > 10:
            shown[0] = time.monotonic()
            print(f"{done}/{total} {unit}", end="\r" if terminal and done < total else "\n", flush=True)

    return progress


def export(args: argparse.Namespace) -> int:
    if args.what != "mm":
        return _export_program(args)
    from effbackbones.train.run import needing_mm

    with needing_mm("an export for mm"):
        from effbackbones.mm.export import export_mm

    for path in export_mm(args.run, Path(args.out)):
        print(path)
    return 0


def _export_program(args: argparse.Namespace) -> int:
    from effbackbones.export import Deployable, ExportError, export

    if Path(args.target).is_dir():
        if args.checkpoint or args.dense:
            raise ExportError(f"{args.target} is a run: --checkpoint and --dense are for the name of a model")
        source = Deployable.from_run(args.target, args.size)
    else:
        source = Deployable.from_model(args.target, args.checkpoint, args.size, args.dense)
        if not args.checkpoint:
            print(f"{args.target}: no --checkpoint is given, its weights are random")
    difference = export(source, args.what, Path(args.out), not args.no_fuse)
    height, width = source.size
    print(f"{args.out}  images (batch, 3, {height}, {width}), off eager execution by {difference:.1e} of the largest")
    if not source.model.continuous:
        print("It ranks tokens: where two are of almost equal rank, rounding may swap them and change its outputs.")
    return 0


def bench(args: argparse.Namespace) -> int:
    from effbackbones.bench import NOTES, Effort, Report, measure, plan, threads

    if "recipe" in args:
        return _bench_data(args)
    if "only" in args:
        return _bench_suite(args)

    groups = plan(
        args.names,
        args.vs,
        modes=args.mode,
        batches=args.batch,
        sizes=args.size,
        dtypes=args.dtype,
        device=args.device,
        channels_last=args.channels_last,
        compile=args.compile,
        dense=args.dense,
    )
    out = _output(args)
    effort = Effort(args.warmup, args.repeats, args.min_time)
    with threads(args.threads):
        report = Report(groups, effort)
        print(report.heading())
        for group in groups:
            print(report.add(measure(group, effort)), flush=True)
            if out:
                report.write(out)
    print(NOTES)
    slow = report.slower_than(args.at_least) if args.at_least else []
    for line in slow:
        print(f"effb: {line}", file=sys.stderr)
    return 1 if report.failed or slow else 0


def _bench_suite(args: argparse.Namespace) -> int:
    from effbackbones.bench import Effort
    from effbackbones.bench.suite import Suite, pairs, report
    from effbackbones.files import replacing
    from effbackbones.viz.suite import plot_suite

    out = _output(args)
    assert out
    suite = Suite(out, pairs(args.device), args.threads)
    keys = suite.missing(args.only)
    if args.list:
        print(*keys, sep="\n")
        return 0
    for line in suite.run(keys, Effort(args.warmup, None, args.min_time)):
        print(line, flush=True)
    text = report(suite.document)
    with replacing(out.with_suffix(".md")) as part:
        part.write_text(f"{text}\n", encoding="utf-8")
    plot_suite(suite.document, out.with_suffix(".png"))
    print(f"{text}\n\n{out}, {out.with_suffix('.md')} and {out.with_suffix('.png')}")
    return 1 if any(entry["error"] for key in keys for entry in suite.document["pairs"][key]) else 0


def _bench_data(args: argparse.Namespace) -> int:
    from effbackbones.bench.data import HEAD, DataReport, measure_cost, measure_loader, worker_counts
    from effbackbones.bench.report import cpu_count
    from effbackbones.train.batch import device_batch
    from effbackbones.train.run import load_target, open_data

    loaded, out = load_target(args.recipe, args.overrides), _output(args)
    recipe = loaded.recipe
    devices = 1 if recipe.trainer.devices == "auto" else int(recipe.trainer.devices)
    recipe.data.batch_size = device_batch(recipe, recipe.trainer.nodes * devices)
    data = open_data(recipe)
    report = DataReport(loaded, args.overrides, data, args.min_time)
    print(report.heading(), flush=True)
    print(report.add_cost(measure_cost(data, args.min_time)), flush=True)
    print(HEAD)
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # more workers than cores, on purpose
    for workers in args.workers or worker_counts(recipe.data.workers, cpu_count()):
        recipe.data.workers = workers
        speed = measure_loader(data.train_dataloader(), data.batch_size, args.min_time)
        print(report.add(speed), flush=True)
    print(report.conclusion())
    if out:
        report.write(out)
    return 0


def _output(args: argparse.Namespace) -> Path | None:
    from effbackbones.bench import BenchError

    out = Path(args.out) if args.out else None
    if out and (out.is_dir() or not out.parent.is_dir()):
        raise BenchError(f"--out {out}: expected a file in a folder that exists")
    return out


def doctor(args: argparse.Namespace) -> int:
    from effbackbones.doctor import report

    findings = report()
    for section, items in findings.items():
        if items:
            print(section)
            for name, text in items.items():
                print(f"  {name:22} {text}")
    return 1 if findings["Problems"] else 0


def _zoo_cells(row: Published) -> Sequence[str]:
    top1 = "-" if row.top1 is None else f"{row.top1:.1f}"
    parameters = f"{row.params / 1e6:.2f} M"
    return row.model, str(row.size), parameters, f"{row.gmacs:.2f}", top1, row.source, row.note


def _print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print one line per row, in columns, whatever the width of the terminal: nothing is folded or cut off."""
    rows = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    for row in rows:
        cells = [
            cell.rjust(width) if name in ("Size", "Parameters", "GMACs", "Top-1") else cell.ljust(width)
            for name, cell, width in zip(head, row, widths, strict=True)
        ]
        print("  ".join(cells).rstrip())


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "ls": ls,
    "show": show,
    "train": train,
    "plan": plan,
    "eval": evaluate,
    "predict": predict,
    "data": data,
    "export": export,
    "bench": bench,
    "doctor": doctor,
}

if __name__ == "__main__":
    sys.exit(main())

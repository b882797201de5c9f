"""The options of train.py."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path

from mpidist.usage import RankArgumentParser


def make_parser(description: str) -> argparse.ArgumentParser:
    """Return the command line's parser."""
    summary, _, rest = description.partition("\n\n")
    p = RankArgumentParser(
        prog="train.py",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_run(p.add_argument_group("what to train, and on what"))
    _add_optimizer(p.add_argument_group("how to train"))
    _add_checkpoints(p.add_argument_group("checkpoints"))
    _add_output(p.add_argument_group("output"))
    return p


def _add_run(p: argparse._ArgumentGroup) -> None:
    p.add_argument(
        "--task",
        choices=("digits", "text"),
        default="digits",
        help="digits: 1,797 handwritten digits, a convolutional network; text: the help texts of "
        "Python, byte by byte, a transformer (default: %(default)s)",
    )
    p.add_argument(
        "--device",
        choices=("cpu", "gpu"),
        default="cpu",
        help="gpu: model and batches lie on one GPU per rank, and gradients go over NCCL "
        "(default: %(default)s)",
    )
    length = p.add_mutually_exclusive_group()
    length.add_argument(
        "--epochs", type=_positive(float), help="passes over the samples (default: the task's)"
    )
    length.add_argument("--steps", type=_positive(int), help="optimizer steps, instead of --epochs")
    p.add_argument(
        "--seed",
        type=_seed,
        default=0,
        help="of the initial values, the order of the samples and dropout (default: %(default)s)",
    )


def _add_optimizer(p: argparse._ArgumentGroup) -> None:
    p.add_argument(
        "--batch-size",
        type=_positive(int),
        metavar="N",
        help="samples per step over all ranks together (default: the task's)",
    )
    p.add_argument(
        "--optimizer",
        choices=("adamw", "adam", "sgd"),
        default="adamw",
        help="sgd is with Nesterov momentum 0.9 (default: %(default)s)",
    )
    p.add_argument(
        "--strategy",
        choices=("ddp", "zero", "shard_grad_op", "full_shard", "hybrid_shard", "no_shard"),
        default="ddp",
        help="what each rank keeps: ddp everything; zero the optimizer's state of its share of the "
        "parameters, and the ranks of a node one copy of these; shard_grad_op also the gradients "
        "of its share only; full_shard also of the parameters its share only, over all ranks; "
        "hybrid_shard is full_shard on each of several nodes; no_shard is ddp by the code of the "
        "latter; the curve stays the same (default: %(default)s)",
    )
    p.add_argument(
        "--sharded-optimizer",
        action="store_const",
        const="zero",
        dest="strategy",
        help="the same as --strategy zero",
    )
    p.add_argument(
        "--mesh",
        type=_mesh,
        metavar="NAME=N,NAME=M",
        help="replicate=N,shard=M, with --strategy hybrid_shard: N groups of M ranks, each of "
        "which shares the model and is on one node (default: nodes x ranks of a node). dp=N,pp=M: "
        "N pipelines of M ranks, on which the layers of the model are spread. -1 is what is left; "
        "the dimension that is named last counts fastest",
    )
    p.add_argument(
        "--schedule",
        choices=("gpipe", "1f1b", "interleaved", "zb-h1", "zbv"),
        help="with --mesh dp=N,pp=M: in which order stages work; interleaved and zbv, of two "
        "stages per rank, go with --strategy ddp (default: 1f1b)",
    )
    p.add_argument(
        "--micro-batches",
        type=_positive(int),
        metavar="N",
        help="with --mesh dp=N,pp=M: into how many parts a pipeline cuts its share of a batch "
        "(default: two per rank of a pipeline)",
    )
    p.add_argument(
        "--units",
        type=_positive(int),
        metavar="BYTES",
        help="with the strategies of FSDP: at most so many bytes of parameters travel together; "
        "over several nodes and on GPUs full_shard splits no model of one unit (default: 32 MiB)",
    )
    p.add_argument(
        "--lr",
        type=_positive(float),
        help="highest learning rate, reached after a tenth of the steps and then lowered to 0 "
        "along a cosine (default: the task's)",
    )
    p.add_argument(
        "--compression",
        choices=("none", "fp16", "bf16"),
        default="none",
        help="how gradients travel between the ranks; the halves save bytes and cost rounding "
        "(default: %(default)s)",
    )


def _add_checkpoints(p: argparse._ArgumentGroup) -> None:
    p.add_argument(
        "--checkpoint-dir",
        type=_directory,
        metavar="DIR",
        help="where checkpoints go; made if missing, all ranks must see it (default: "
        "OUT/checkpoints)",
    )
    p.add_argument(
        "--checkpoint-every",
        type=_positive(int),
        default=0,
        metavar="STEPS",
        help="steps between checkpoints, which are written while training goes on (default: only "
        "at the end, and when stopped by a signal)",
    )
    p.add_argument(
        "--keep",
        type=_positive(int),
        default=3,
        metavar="N",
        help="how many checkpoints stay, the newest ones (default: %(default)s)",
    )
    begin = p.add_mutually_exclusive_group()
    begin.add_argument(
        "--resume",
        nargs="?",
        const="latest",
        type=_step,
        metavar="STEP",
        help="go on from the newest checkpoint, or that of STEP, if there is one, on any number of "
        "ranks; the options must be those of that run. Later checkpoints than STEP get other "
        "names. A job that Slurm has started again goes on from the newest one that is whole",
    )
    begin.add_argument(
        "--overwrite",
        action="store_true",
        help="begin anew where checkpoints of another run are, and remove these",
    )


def _add_output(p: argparse._ArgumentGroup) -> None:
    p.add_argument(
        "--out",
        type=_directory,
        metavar="DIR",
        help="where metrics.jsonl and loss.png go; made if missing (default: runs/TASK)",
    )
    p.add_argument(
        "--log-every",
        type=_positive(int),
        default=10,
        metavar="STEPS",
        help="steps per training record (default: %(default)s)",
    )
    p.add_argument("--no-progress", action="store_true", help="draw no progress bar")
    p.add_argument("--no-plot", action="store_true", help="draw no picture")


def _seed(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {text}")
    return value


_seed.__name__ = "int"  # argparse says "invalid int value"


def _step(text: str) -> int | str:
    if text != "latest" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a step nor 'latest'")
    return text if text == "latest" else int(text)


def _mesh(text: str) -> dict[str, int]:
    pairs = [part.split("=") for part in text.split(",")]
    try:
        sizes = {name.strip(): int(size) for name, size in pairs}
    except ValueError:
        sizes = {}
    known = sorted(sizes) in (["replicate", "shard"], ["dp", "pp"])
    if not known or len(pairs) != len(sizes):
        raise argparse.ArgumentTypeError(
            "expected a number of ranks for both, as in replicate=2,shard=-1 or dp=2,pp=-1; got "
            f"{text!r}"
        )
    return sizes


def _directory(text: str) -> Path:
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
        raise argparse.ArgumentTypeError(f"{text!r} is a URL; expected a directory")
    return Path(text)


def _positive(kind: type[int | float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse

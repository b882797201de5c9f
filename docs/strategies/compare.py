"""Train one model under each strategy, and show that the loss is the same.

    python docs/strategies/compare.py

Starts jobs/train.py with the mpirun that is installed beside this Python. Writes the picture and
the table of docs/concepts/fsdp.rst, curves.png and curves.txt, into --out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mpidist.train import Record, read_records

HERE = Path(__file__).resolve().parent
TRAIN = HERE.parents[1] / "jobs" / "train.py"

REFERENCE = "ddp"
STRATEGIES: Mapping[str, Sequence[str]] = {
    "ddp": (),
    "zero": (),
    "no_shard": (),
    "shard_grad_op": (),
    "full_shard": (),
    "hybrid_shard": ("--mesh", "replicate=2,shard=-1"),
}

# Okabe and Ito's colours: told apart with any colour vision; dashes help in grey print.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7")


@dataclass(frozen=True, slots=True)
class Curve:
    """One run: its name, its records, and the KiB that the ledger counts on a rank."""

    name: str
    records: Sequence[Record]
    held: float

    def losses(self, kind: str) -> dict[int, float]:
        """Return the loss after each step that has a record of this kind."""
        return {record.step: record.loss for record in self.records if record.kind == kind}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--task", default="text", help="of train.py (default: %(default)s)")
    p.add_argument("--steps", type=int, default=300, help="of each run (default: %(default)s)")
    p.add_argument("--ranks", type=int, default=4, help="of each run (default: %(default)s)")
    p.add_argument("--out", type=Path, default=HERE, help="folder (default: that of this file)")
    p.add_argument(
        "--launch", default="", help="more options of mpirun, as in --launch=--oversubscribe"
    )
    options = p.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        curves = [train("one rank", REFERENCE, 1, options, Path(scratch))]
        curves += [train(name, name, options.ranks, options, Path(scratch)) for name in STRATEGIES]
    where = f"train.py --task {options.task} --steps {options.steps}, ranks: {options.ranks}"
    (options.out / "curves.txt").write_text(f"{where}\n\n{table(curves)}\n", encoding="utf-8")
    draw(curves, where, options.out / "curves.png")


def train(
    name: str, strategy: str, ranks: int, options: argparse.Namespace, scratch: Path
) -> Curve:
    """Run train.py once."""
    out = scratch / name.replace(" ", "-")
    mpirun = [
        str(Path(sys.executable).parent / "mpirun"),
        *options.launch.split(),
        "-n",
        str(ranks),
    ]
    command = [*mpirun, sys.executable, str(TRAIN), "--no-plot", "--no-progress", "--out", str(out)]
    command += ["--task", options.task, "--steps", str(options.steps)]
    command += ["--strategy", strategy, *STRATEGIES[strategy]]
    ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603
    said = ended.stdout
    (total,) = [line for line in said.splitlines() if line.startswith("total ")]
    (unit,) = [line.split()[0] for line in said.splitlines() if line.endswith("its node")]
    kibibytes = {"KiB": 1, "MiB": 1024}[unit] * float(total.split()[1].replace(",", ""))
    return Curve(name, read_records(out / "metrics.jsonl"), kibibytes)


def difference(curve: Curve, reference: Curve) -> dict[int, float]:
    """Return by how much the training losses differ, relative to those of the reference."""
    expected = reference.losses("train")
    return {
        step: abs(loss - expected[step]) / expected[step]
        for step, loss in curve.losses("train").items()
    }


def table(curves: Sequence[Curve]) -> str:
    """Return loss and memory of each run as text."""
    reference = next(curve for curve in curves if curve.name == REFERENCE)
    steps = list(reference.losses("train"))
    chosen = [steps[len(steps) * part // 3 - 1] for part in (1, 2, 3)]
    heads = [*(f"step {step}" for step in chosen), "held out", "from ddp's", "KiB per rank"]
    lines = [f"{'loss in nats':<14}" + "".join(f"{head:>14}" for head in heads)]
    for curve in curves:
        losses = curve.losses("train")
        cells = [f"{losses[step]:.6f}" for step in chosen]
        cells += [f"{list(curve.losses('held-out').values())[-1]:.6f}"]
        cells += [f"{max(difference(curve, reference).values()):.1e}", f"{curve.held:,.0f}"]
        lines.append(f"{curve.name:<14}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def draw(curves: Sequence[Curve], where: str, path: Path) -> None:
    """Draw the losses, one over the other, and beside them how far they are apart."""
    reference = next(curve for curve in curves if curve.name == REFERENCE)
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(where, fontsize=11)
    loss, apart = figure.subplots(1, 2)
    for number, (curve, colour) in enumerate(zip(curves, COLOURS, strict=True)):
        losses = curve.losses("train")
        # The curves cover each other: the first ones are drawn broad, and show on both sides.
        width = 1.2 + 1.6 * (len(curves) - 1 - number)
        loss.plot(
            list(losses), list(losses.values()), color=colour, linewidth=width, label=curve.name
        )
        if curve is not reference:
            differences = difference(curve, reference)
            apart.plot(
                list(differences),
                list(differences.values()),
                color=colour,
                linewidth=1.5 if any(differences.values()) else width / 2,
                clip_on=False,
            )
    loss.set(title="Loss of the training samples", ylabel="cross-entropy (nats per target)")
    apart.set(title="Difference from ddp (0: none)", ylabel="relative, of the loss")
    apart.set_yscale("symlog", linthresh=1e-9)
    apart.set_ylim(bottom=0)
    for axes in (loss, apart):
        axes.set_xlabel("optimizer step")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles, names = loss.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(curves), frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()

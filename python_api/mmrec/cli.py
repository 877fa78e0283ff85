"""The command ``mmrec``: train, evaluate and query multimodal recommenders.

Exit codes: 0 done, 1 failed (bad data, full disk, …), 2 wrong command line, 130 interrupted. Whatever fails says so in
one line on stderr; ``--debug`` adds the traceback. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from .commands import serving
from .commands.console import FAILED, INTERRUPTED, Interrupted, one_line_warnings, summary
from .commands.options import (
    BackboneName,
    DataFolder,
    Debug,
    Epochs,
    HoldOut,
    JsonFile,
    Layout,
    LoraRank,
    Mask,
    Modalities,
    OptionalData,
    Protocol,
    Quantize,
    Quantized,
    Settings,
    SplitSeed,
    Stage,
    TuneBackbone,
)

__all__ = ["app", "main"]

app = typer.Typer(
    name="mmrec",
    help="Multimodal recommenders with a quantised language model behind them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where catalogue, runs and report go.")] = Path(
        "runs/demo"
    ),
    users: Annotated[int, typer.Option(min=20, help="Users to generate.")] = 600,
    items: Annotated[int, typer.Option(min=40, help="Items to generate.")] = 300,
    epochs: Epochs = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    backbone: BackboneName = None,
    settings: Settings = None,
    json_file: JsonFile = None,
    debug: Debug = False,
) -> None:
    """Generate a catalogue, train on it, evaluate, recommend, and write a report: the whole way in a few minutes."""
    from .commands.demo import demo_command

    demo_command(
        out=out, users=users, items=items, epochs=epochs, seed=seed, backbone=backbone, settings=settings or [],
        json_file=json_file,
    )  # fmt: skip


@app.command()
def train(
    data: DataFolder,
    out: Annotated[Path, typer.Option(metavar="RUN", help="Folder of the run.")],
    protocol: Annotated[
        Protocol, typer.Option(help="S leave-last-out, G random per user, T global time.")
    ] = Protocol.S,
    modalities: Modalities = "all",
    backbone: BackboneName = None,
    quantize: Quantized = Quantize.nf4,
    lora: LoraRank = 8,
    tune_backbone: TuneBackbone = False,
    epochs: Epochs = None,
    seed: Annotated[int, typer.Option(min=0, help="Of initial weights, data order and dropout.")] = 0,
    settings: Settings = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the run's checkpoint, to the same bits.")
    ] = False,
    floors: Annotated[bool, typer.Option(help="Evaluate the floors too.")] = True,
    compare_identity: Annotated[
        bool, typer.Option("--identity/--no-identity", help="Train the identity-only model too, to compare with.")
    ] = True,
    parallel: Annotated[
        str | None,
        typer.Option(
            metavar="WAY", help="Under torchrun: ddp (default), whole weights in every process, or fsdp, parts of them."
        ),
    ] = None,
    layout: Layout = "auto",
    split_seed: SplitSeed = 0,
    hold_out: HoldOut = None,
    json_file: JsonFile = None,
    debug: Debug = False,
) -> None:
    """Train a recommender and evaluate it beside the floors. Ctrl-C saves; --resume goes on."""
    from .commands.settings import Choices
    from .commands.train import train_command

    choices = Choices(
        modalities=modalities, backbone=backbone, quantize=quantize.value, lora=lora, tune_backbone=tune_backbone,
        epochs=epochs, settings=tuple(settings or ()),
    )  # fmt: skip
    train_command(
        data=data, out=out, protocol=protocol.value, choices=choices, seed=seed, resume=resume, floors=floors,
        compare_identity=compare_identity, layout=layout, split_seed=split_seed, hold_out=hold_out, parallel=parallel,
        json_file=json_file,
    )  # fmt: skip


@app.command()
def evaluate(
    model: Annotated[str, typer.Option(metavar="MODEL", help="most-popular, item-knn, or the folder of a run.")],
    data: OptionalData = None,
    protocol: Annotated[
        Protocol | None,
        typer.Option(help="S leave-last-out, G random per user, T global time. A run knows its own."),
    ] = None,
    neighbours: Annotated[int | None, typer.Option(min=1, help="Nearest neighbours of item-knn; default all.")] = None,
    stage: Annotated[Stage, typer.Option(help="Which held-out part is predicted.")] = Stage.test,
    mask: Annotated[
        Mask | None, typer.Option(help="Seen items left out; default as published for the protocol.")
    ] = None,
    against: Annotated[
        list[str] | None, typer.Option(metavar="MODEL", help="Compare with this model too; repeatable.")
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option(metavar="NAME@K", help="Columns; default HR@10, NDCG@10, Recall@20. Repeatable.")
    ] = None,
    groups: Annotated[bool, typer.Option(help="Also head, middle, tail and cold items.")] = True,
    floors: Annotated[bool, typer.Option(help="Print the floors beside.")] = True,
    layout: Layout = "auto",
    split_seed: SplitSeed = 0,
    hold_out: HoldOut = None,
    json_file: JsonFile = None,
    debug: Debug = False,
) -> None:
    """Rank all items for every user: metrics, floors beside, paired intervals."""
    from .commands.evaluate import evaluate_command

    evaluate_command(
        data=data, layout=layout, protocol=None if protocol is None else protocol.value, model=model,
        neighbours=neighbours, stage=stage.value, mask=None if mask is None else mask.value,
        against=against or [], metrics=metric or [], groups=groups, floors=floors, split_seed=split_seed,
        hold_out=hold_out, json_file=json_file,
    )  # fmt: skip


@app.command()
def recommend(
    run: Annotated[Path, typer.Option(metavar="RUN", help="Folder of a trained run.")],
    user: Annotated[str | None, typer.Option(metavar="ID", help="A user of the data.")] = None,
    history: Annotated[
        str | None, typer.Option(metavar="ID,ID,…", help="Item ids, oldest first, instead of a user.")
    ] = None,
    k: Annotated[int, typer.Option("-k", "--top", min=1, help="How many items.")] = 10,
    data: OptionalData = None,
    layout: Layout = "auto",
    json_file: JsonFile = None,
    debug: Debug = False,
) -> None:
    """Answer with titles, scores and how much each modality was listened to."""
    from .commands.recommend import recommend_command

    recommend_command(run=run, user=user, history=history, k=k, data=data, layout=layout, json_file=json_file)


@app.command()
def info(
    data: OptionalData = None,
    run: Annotated[Path | None, typer.Option(metavar="RUN", help="Folder of a run.")] = None,
    layout: Layout = "auto",
    json_file: JsonFile = None,
    debug: Debug = False,
) -> None:
    """What is installed, what a data folder holds, what a run is."""
    from .commands.info import info_command

    info_command(data=data, layout=layout, run=run, json_file=json_file)


@app.command()
def results(
    data: DataFolder,
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where the runs and tables go; finished runs are reused.")
    ],
    protocol: Annotated[
        Protocol, typer.Option(help="S leave-last-out, G random per user, T global time.")
    ] = Protocol.S,
    seeds: Annotated[str, typer.Option(help="Comma-separated seeds, at least 3.")] = "0,1,2,3,4",
    modalities: Modalities = "all",
    backbone: BackboneName = None,
    quantize: Quantized = Quantize.nf4,
    lora: LoraRank = 8,
    tune_backbone: TuneBackbone = False,
    epochs: Epochs = None,
    settings: Settings = None,
    layout: Layout = "auto",
    split_seed: SplitSeed = 0,
    hold_out: HoldOut = None,
    peer: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A published model to train too, see peers; repeatable.")
    ] = None,
    json_file: JsonFile = None,
    debug: Debug = False,
) -> None:
    """Multimodal, identity-only and each modality alone, several seeds, paired intervals. Resumable."""
    from .commands.results import results_command
    from .commands.settings import Choices

    choices = Choices(
        modalities=modalities, backbone=backbone, quantize=quantize.value, lora=lora, tune_backbone=tune_backbone,
        epochs=epochs, settings=tuple(settings or ()),
    )  # fmt: skip
    results_command(
        data=data, out=out, protocol=protocol.value, seeds=seeds, choices=choices, layout=layout, split_seed=split_seed,
        hold_out=hold_out, peers=peer or [], json_file=json_file,
    )  # fmt: skip


@app.command()
def peers(
    data: DataFolder,
    protocol: Annotated[
        Protocol, typer.Option(help="S leave-last-out, G random per user, T global time.")
    ] = Protocol.G,
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="bpr, lightgcn, vbpr, bm3, freedom, sasrec, esasrec; repeatable. Default: all that the data allows.",
        ),
    ] = None,
    modalities: Modalities = "all",
    backbone: BackboneName = None,
    quantize: Quantized = Quantize.nf4,
    seeds: Annotated[str, typer.Option(help="Comma-separated seeds.")] = "0",
    settings: Settings = None,
    layout: Layout = "auto",
    split_seed: SplitSeed = 0,
    hold_out: HoldOut = None,
    json_file: JsonFile = None,
    debug: Debug = False,
) -> None:
    """Train published models and evaluate them beside the floors."""
    from .commands.peers import peers_command
    from .commands.settings import Choices

    choices = Choices(
        modalities=modalities, backbone=backbone, quantize=quantize.value, settings=tuple(settings or ())
    )  # fmt: skip
    peers_command(
        data=data, protocol=protocol.value, models=model or [], seeds=seeds, choices=choices, layout=layout,
        split_seed=split_seed, hold_out=hold_out, json_file=json_file,
    )  # fmt: skip


@app.command()
def experiment(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Which; without it, all are listed.")] = None,
    data: OptionalData = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where runs, tables and the report go; default runs/NAME.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Comma-separated seeds; default those of the experiment.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A setting of the experiment, as the list says; repeatable."),
    ] = None,
    layout: Layout = "auto",
    json_file: JsonFile = None,
    debug: Debug = False,
) -> None:
    """Ask one question of the data: prompts, alignment, modalities, adapters, judges. Resumable, with a report."""
    from .commands.experiment import experiment_command, list_experiments

    if name is None:
        list_experiments()
        return
    if data is None:
        raise ValueError("--data is needed: the folder of a catalogue")
    experiment_command(
        name=name, data=data, out=out or Path("runs") / name, seeds=seeds, settings=settings or [], layout=layout,
        json_file=json_file,
    )  # fmt: skip


@app.command()
def export(
    data: DataFolder,
    to: Annotated[str, typer.Option("--to", metavar="LAYOUT", help="mmrec, recbole, p5 or lcrec.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the files go; new or empty.")],
    layout: Layout = "auto",
    protocol: Annotated[
        Protocol | None,
        typer.Option(help="Split that layout mmrec keeps; default the data's own, else G. Other layouts keep none."),
    ] = None,
    split_seed: SplitSeed = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into a folder that holds files.")] = False,
    json_file: JsonFile = None,
    debug: Debug = False,
) -> None:
    """Write the data in another toolbox's layout, and tell what that layout does not hold."""
    from .commands.export import export_command

    export_command(
        data=data, to=to, out=out, layout=layout, protocol=None if protocol is None else protocol.value,
        split_seed=split_seed, overwrite=overwrite, json_file=json_file,
    )  # fmt: skip


app.add_typer(serving.app)


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line (default: the process's own) and returns its exit code; never raises."""
    state: dict[str, Any] = {"debug": False}
    try:
        with one_line_warnings("--debug" in (sys.argv[1:] if arguments is None else arguments)):
            code = app(
                args=None if arguments is None else list(arguments), standalone_mode=False, obj=state, prog_name="mmrec"
            )
    except Interrupted as stop:
        print(f"mmrec: interrupted, {stop}", file=sys.stderr)
        return INTERRUPTED
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else FAILED
    except BrokenPipeError:
        # The reader is gone; without this the interpreter complains once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        return _report(error, debug=state["debug"])
    if code == INTERRUPTED:
        print("mmrec: interrupted", file=sys.stderr)
    return code if isinstance(code, int) else 0


def main() -> None:
    """The console script."""
    sys.exit(run())


def _report(error: Exception, *, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    # typer carries its own copy of click in newer versions: its errors are known by what they can do.
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):
        text = " ".join(str(error.format_message()).split())
        if text:
            print(f"mmrec: error: {text}", file=sys.stderr)
        return int(error.exit_code)
    print(f"mmrec: error: {summary(error)}", file=sys.stderr)
    return FAILED

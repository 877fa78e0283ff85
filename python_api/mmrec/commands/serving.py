"""The commands of ``mmrec`` that serve a trained run, and those that time it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    Approximate,
    Debug,
    Device,
    Engine,
    JsonFile,
    Layout,
    OptionalData,
    Quantize,
    Quantized,
    Stage,
    StoreDtype,
)

__all__ = ["app"]

app = typer.Typer()

ApproximateKind = Annotated[
    Approximate | None, typer.Option("--ann", help="Approximate retrieval by FAISS, for large catalogues.")
]
Reranker = Annotated[
    str | None, typer.Option(metavar="NAME", help="Causal model, folder or Hugging Face name, that ranks again.")
]


@app.command()
def index(
    run: Annotated[Path, typer.Option(metavar="RUN", help="Folder of a trained run.")],
    out: Annotated[Path, typer.Option(metavar="STORE", help="Folder of the store; a new version of it if it exists.")],
    dtype: Annotated[StoreDtype, typer.Option(help="How vectors are stored.")] = StoreDtype.float32,
    tokens: Annotated[
        list[str] | None,
        typer.Option(metavar="MODALITY", help="Store its token rows too, as the item tower fuses them; repeatable."),
    ] = None,
    items: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Other items than those of the data: items.*, images/, …")
    ] = None,
    update: Annotated[bool, typer.Option("--update", help="Put --items into the store that is there.")] = False,
    remove: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Take items out of the store instead: an id per line.")
    ] = None,
    engine: Annotated[
        Engine,
        typer.Option(help="What encodes --items: this process (under torchrun all ranks), or a Ray Data job."),
    ] = Engine.local,
    workers: Annotated[int | None, typer.Option(min=1, help="Most actors of Ray; default: one per CPU.")] = None,
    data: OptionalData = None,
    layout: Layout = "auto",
    json_file: JsonFile = None,
    debug: Debug = False,
) -> None:
    """Write the items of a run into a store, from which requests are answered."""
    from .index import index_command

    index_command(
        run=run, out=out, dtype=dtype.value, tokens=tokens or (), items=items, update=update, remove=remove,
        engine=engine.value, workers=workers, data=data, layout=layout, json_file=json_file,
    )  # fmt: skip


@app.command()
def serve(
    run: Annotated[Path, typer.Option(metavar="RUN", help="Folder of a trained run.")],
    store: Annotated[
        Path | None,
        typer.Option(metavar="STORE", help="Of mmrec index; default RUN/store, made if it is not there."),
    ] = None,
    data: OptionalData = None,
    layout: Layout = "auto",
    host: Annotated[str, typer.Option(help="Other than this machine: with --read-only or a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    threads: Annotated[int | None, typer.Option(min=1, help="Of the model; default: one less than cores.")] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Most requests that are answered together.")] = 32,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds that a request may wait for its turn.")] = 1.0,
    read_only: Annotated[bool, typer.Option("--read-only", help="Nobody writes to the store.")] = False,
    costs: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What answers cost: read if it is there, else written.")
    ] = None,
    calibrate: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="Per case, to measure costs; 0: no budgets.")
    ] = 0.3,
    plans: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="latency.json of mmrec latency: its best plan that fits."),
    ] = None,
    ann: ApproximateKind = None,
    reranker: Reranker = None,
    quantize: Quantized = Quantize.nf4,
    access_log: Annotated[bool, typer.Option("--access-log", help="A line per request.")] = False,
    debug: Debug = False,
) -> None:
    """Answer over HTTP: recommendations, new items, metrics, and a page to try it. $MMREC_TOKEN guards what writes."""
    from .serve import serve_command

    serve_command(
        run=run, store=store, data=data, layout=layout, host=host, port=port, threads=threads, max_batch=max_batch,
        timeout=timeout, read_only=read_only, costs=costs, calibrate_seconds=calibrate, plans=plans,
        ann=None if ann is None else ann.value, reranker=reranker,
        quantize=quantize.value, access_log=access_log,
    )  # fmt: skip


@app.command()
def latency(
    run: Annotated[list[Path], typer.Option(metavar="RUN", help="Folder of a trained run; repeatable, to compare.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where report.html and latency.json go.")],
    dtype: Annotated[list[StoreDtype] | None, typer.Option(help="Of the store; default: all three.")] = None,
    depth: Annotated[
        list[int] | None, typer.Option(metavar="N", min=1, help="Last items read; default 1, 5, 10, 20, and all.")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(metavar="B", min=1, help="Histories at a time; default: 1, 8, 32.")
    ] = None,
    reranker: Reranker = None,
    quantize: Quantized = Quantize.nf4,
    rerank: Annotated[
        list[int] | None, typer.Option(metavar="W", min=1, help="Items ranked again; default 4, 16.")
    ] = None,
    rerank_users: Annotated[int, typer.Option(min=1, help="Most users that are ranked again.")] = 200,
    stage: Annotated[Stage, typer.Option(help="Which held-out part is predicted.")] = Stage.test,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: torch's own choice.")] = None,
    seconds: Annotated[float, typer.Option(min=0, help="Per way to answer, beyond the least calls.")] = 3.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the histories that are drawn.")] = 0,
    data: OptionalData = None,
    layout: Layout = "auto",
    json_file: JsonFile = None,
    debug: Debug = False,
) -> None:
    """What quality costs in milliseconds: depth of the history, dtype of the store, reranking; and each stage."""
    from .latency import latency_command

    latency_command(
        runs=run, out=out, data=data, layout=layout, dtypes=[d.value for d in dtype or StoreDtype],
        depths=depth or [1, 5, 10, 20], batches=batch or [1, 8, 32], widths=rerank or [4, 16], reranker=reranker,
        quantize=quantize.value, rerank_users=rerank_users, stage=stage.value, threads=threads, seconds=seconds,
        seed=seed, json_file=json_file,
    )  # fmt: skip


@app.command("bench-serving")
def bench_serving(
    items: Annotated[list[int] | None, typer.Option(metavar="N", help="Default: 100000 and 1000000.")] = None,
    dtype: Annotated[list[StoreDtype] | None, typer.Option(help="Default: float32 and int8.")] = None,
    batch: Annotated[
        list[int] | None, typer.Option(metavar="B", help="Histories at a time; default: 1, 8, 32.")
    ] = None,
    history: Annotated[int, typer.Option(min=1, help="Items of each history.")] = 50,
    k: Annotated[int, typer.Option("-k", "--top", min=1, help="How many items.")] = 10,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Default: torch's own choice; with --rate one less than cores.")
    ] = None,
    ann: ApproximateKind = None,
    rate: Annotated[
        float | None, typer.Option(metavar="R", help="Ask a server in another process, R times per second.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0, help="Time per case, without --rate beyond 200 calls.")] = 5.0,
    json_file: JsonFile = None,
    json_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write the rows to DIR/<device>/serving.json, or server.json."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Time requests against generated stores: stage by stage in this process, or from a server under load."""
    from .bench_serving import bench_serving_command

    bench_serving_command(
        items=items or [100_000, 1_000_000], dtypes=[d.value for d in dtype or (StoreDtype.float32, StoreDtype.int8)],
        batches=batch or [1, 8, 32], history=history, k=k, threads=threads, ann=None if ann is None else ann.value,
        rate=rate, seconds=seconds,
        json_file=json_file, json_dir=json_dir,
    )  # fmt: skip


@app.command()
def benchmark(
    model: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="qwen2-0.5b, minilm, tiny; default: the first two.")
    ] = None,
    dtype: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Default: all of the device.")] = None,
    mode: Annotated[list[str] | None, typer.Option(metavar="MODE", help="forward, step; default: both.")] = None,
    lora: Annotated[int, typer.Option(metavar="R", min=0, help="Rank of the adapters.")] = 16,
    device: Annotated[Device, typer.Option(help="Where.")] = Device.cpu,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: torch's own choice.")] = None,
    seconds: Annotated[float, typer.Option(min=0, help="Time per case beyond the least number of calls.")] = 10.0,
    json_file: JsonFile = None,
    json_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write them to DIR/<device>/backbone.json.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Time backbones under NF4 and LoRA: with the kernels, with bitsandbytes and peft alone, and dense."""
    from .benchmark import benchmark_command

    benchmark_command(
        models=model or [], dtypes=dtype or [], modes=mode or [], rank=lora, device=device.value, threads=threads,
        seconds=seconds, json_file=json_file, json_dir=json_dir,
    )  # fmt: skip

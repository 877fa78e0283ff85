"""Training in two and four gloo processes against one process: gradients, loss curves, checkpoints."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from rec_helpers import ITEMS, KNOWN, POPULARITY, TRAINED, batch, config, inputs, model_of, objective_of
from torch.multiprocessing.spawn import spawn

from mmrec.fusion import TableInputs
from mmrec.recommender import Batch, RecommenderConfig
from mmrec.recommender.parallel import ALONE, Alone, Replicas, several
from mmrec.recommender.training import Content, Trained, loop, train
from mmrec.recommender.training.step import Step
from mmrec.recommender.training.storage import load_tensors

KINDS = ("ddp", "fsdp")
EXACT: dict[str, Any] = {"balance_weight": 0.0, "z_weight": 0.1, "local_entropy_weight": 0.1}
FEW = np.isin(np.arange(ITEMS), [0, 3, 8])

# Settings whose gradients are those of one process. "few": three items, of which a fourth process has none; the batch
# has two windows, of which it has none either.
STEPS: dict[str, dict[str, Any]] = {
    "all items": {},
    "in the batch": {"negatives": "batch", "label_smoothing": 0.1},
    "a sample aligned": {"align_items": 4, "score": "cosine", "align": "projection"},
    "nothing aligned": {"align_items": 0, "negatives": "batch"},
    "parts": {"disentangle": "contrast", "disentangle_weight": 0.0},
    "identities": {"modalities": ("identity",)},
    "few": {"align_items": 2},
}

SMALL: dict[str, Any] = {
    "modalities": ("identity", "image", "table"), "width": 8, "heads": 1, "item_heads": 1, "layers": 1, "max_length": 6,
    "expert_hidden": 8, "image_size": 16, "image_patch": 16, "batch_size": 16, "epochs": 2, "learning_rate": 0.01,
    "dropout": 0.0, "content_dropout": 0.0, "identity_dropout": 0.0, "router_bias_rate": 0.01, **EXACT,
}  # fmt: skip
TRAININGS: dict[str, dict[str, Any]] = {
    "all items": {"align_items": 7, "weight_decay": 0.1, "clip_norm": 0.5},
    "in the batch": {"negatives": "batch", "extra_negatives": 9, "label_smoothing": 0.1, "router_score": "sigmoid"},
}
DROPPING = {"dropout": 0.3, "content_dropout": 0.2, "identity_dropout": 0.2, "modality_dropout": 0.1}
STOP = 4  # steps before a training is interrupted


def step_of(name: str, ranks: Alone) -> tuple[Step, Batch]:
    changes = {**EXACT, **STEPS[name]}
    modalities = changes.pop("modalities", ())
    trained, popularity, known, windows = TRAINED, POPULARITY, KNOWN, batch()
    if name == "few":
        trained, popularity, known = FEW, np.where(FEW, 2, 0), np.flatnonzero(FEW)
        windows = Batch(torch.tensor([0, 3, 8, 3]), torch.tensor([0, 3, 4]), torch.tensor([3, 8, 0, 0]))
    model = model_of(config(*modalities, **changes), trained).train()
    objective = objective_of(model, popularity)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    rows = torch.from_numpy(known)
    content = inputs().select(rows)
    return Step(model, objective, Content(inputs(), None), rows, content, ranks), windows  # type: ignore[arg-type]


def gradients(name: str, ranks: Alone) -> dict[str, Any]:
    """Of one step: losses, gradients before and after they are clipped, and the random state afterwards."""
    torch.manual_seed(5)
    step, windows = step_of(name, ranks)
    wrapped = ranks.wrap(step, unused=False)
    for number in range(2):  # a parameter without a gradient would be missed in the second one
        step.zero_grad()
        with ranks.apart(0, number):
            losses, _ = wrapped(windows, None)
            losses.total.backward()
    parameters = list(step.parameters())
    ranks.settle(parameters)
    found: dict[str, Any] = {f"loss {k}": v for k, v in ranks.average(losses)._asdict().items() if v is not None}
    for what in ("gradient", "clipped"):
        grads = {f"{what} {n}": p.grad for n, p in step.named_parameters() if p.grad is not None}
        found |= {n: grad.detach().clone() for n, grad in ranks.full(grads).items()}
        ranks.clip(parameters, 0.05)
    return {**found, "random": torch.get_rng_state()}


@contextmanager
def float64() -> Iterator[None]:
    """Models in double precision: curves then differ by more than rounding, or not at all."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def trained(data: dict[str, Any], changes: dict[str, Any], folder: Path, ranks: Alone, **more: Any) -> Trained:
    settings = RecommenderConfig(**{**SMALL, **changes})
    identity = {"config": settings.to_dict()}
    with float64():
        return train(data["content"], data["split"], settings, folder, identity, ranks=ranks, **more)


def facts(found: Trained) -> dict[str, Any]:
    """What two trainings are compared by."""
    curves = [{k: v for k, v in row.items() if k != "seconds"} for row in found.curves]
    numbers = {f"{name} {n}": torch.tensor(v) for n, row in enumerate(curves) for name, v in row.items()}
    weights = {**found.model.state_dict(), **found.adapter}
    return {**numbers, **weights, "vectors": found.items.vectors, "load": torch.tensor(found.load or [])}


def interrupted(data: dict[str, Any], changes: dict[str, Any], folder: Path, ranks: Alone, who: int) -> str:
    """Trains until process `who` has a signal in its step STOP; what every process then says."""
    step, done = loop._Loop._step, []

    def stopped(self: loop._Loop, batch: Batch) -> float:
        done.append(1)
        if len(done) == STOP and ranks.rank == who:
            signal.raise_signal(ranks.signals[-1])
        return step(self, batch)

    loop._Loop._step = stopped  # type: ignore[method-assign]
    try:
        trained(data, changes, folder, ranks)
    except KeyboardInterrupt as stop:
        return f"{len(done)} steps, {stop}"
    finally:
        loop._Loop._step = step  # type: ignore[method-assign]
    return "nothing"


def stop_and_go(data: dict[str, Any], folder: Path, kinds: dict[str, Replicas]) -> dict[str, Any]:
    """A training that "fsdp" begins and "ddp" ends; the checkpoint is kept for one process to end it too. And one with
    dropout, in one go and in two."""
    begun, last = folder / "begun", dist.get_world_size() - 1
    results: dict[str, Any] = {"said": interrupted(data, TRAININGS["all items"], begun, kinds["fsdp"], last)}
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.copytree(begun, folder / "kept")
    results["ended"] = facts(trained(data, TRAININGS["all items"], begun, kinds["ddp"], resume=True))
    results["dropping"] = facts(trained(data, DROPPING, folder / "dropping", kinds["ddp"]))
    interrupted(data, DROPPING, folder / "halves", kinds["ddp"], 0)
    results["halves"] = facts(trained(data, DROPPING, folder / "halves", kinds["ddp"], resume=True))
    torch.manual_seed(7)
    results["drawn"] = [drawn(kinds["ddp"], seed, step) for seed, step in ((0, 1), (0, 2), (1, 1), (0, 1))]
    results["elsewhere"] = raised(
        lambda: kinds["ddp"].check_same(f"step {min(1, dist.get_rank())}", "runs/x"), ValueError
    )
    failing: Callable[[], int] = lambda: int("not a number")  # noqa: E731
    results["first failed"] = raised(lambda: kinds["ddp"].by_first(failing), (ValueError, RuntimeError))
    return results


def drawn(ranks: Replicas, seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a rank draws in a step by itself, and with all others."""
    with ranks.apart(seed, step):
        before = torch.rand(3)
        with ranks.together():
            common = torch.rand(3)
        return torch.cat([before, torch.rand(3)]), common


def raised(work: Callable[[], object], kind: Any) -> str:
    try:
        work()
    except kind as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def process(rank: int, folder: str, count: int, tuned: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=count)
    data = torch.load(f"{folder}/data.pt", weights_only=False)
    results: dict[str, Any] = {}
    kinds = {kind: several(kind) for kind in KINDS}
    for kind, ranks in kinds.items():
        results |= {(kind, "step", name): gradients(name, ranks) for name in STEPS}
        for name, changes in TRAININGS.items():
            out = Path(folder) / f"{kind} {name}"
            results[kind, "training", name] = facts(trained(data, changes, out, ranks))
        results[kind, "tuned"] = facts(tuned_training(data, tuned, Path(folder) / f"{kind} tuned", ranks))
    results |= stop_and_go(data, Path(folder), kinds)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()  # nobody leaves while another still talks
    dist.destroy_process_group()
    os._exit(0)  # all is said: an interpreter that shuts down beside gloo's threads aborts once in a while


def tuned_training(data: dict[str, Any], settings: dict[str, Any], folder: Path, ranks: Alone) -> Trained:
    """With the adapter of a language model, in float32."""
    from mmrec.recommender.training import load_backbone

    chosen = RecommenderConfig(**settings)
    backbone = load_backbone(chosen)
    with torch.no_grad():
        for parameter in backbone.trainable_parameters():
            parameter += ranks.rank  # the first one's adapter is that of all
    content = dataclasses.replace(data["text"], backbone=backbone)
    return train(content, data["split"], chosen, folder, {}, ranks=ranks)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A BERT of one block with random weights, one token per letter, without dropout."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("model")
    letters = [chr(code) for code in range(33, 127)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    transformers.BertTokenizer(str(folder / "vocab.txt"), model_max_length=32).save_pretrained(folder)
    made = transformers.BertConfig(
        vocab_size=len(words), hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=40, initializer_range=0.2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.BertModel(made).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tuned(bert: str) -> dict[str, Any]:
    """Settings of a training with a LoRA adapter on NF4 weights; one item's are too few for four processes."""
    text = {"modalities": ("identity", "text"), "backbone": bert, "tune_backbone": True, "lora_rank": 2}
    return {**SMALL, **text, "text_max_length": 16, "text_rank": 24, "tune_items": 1, "backbone_learning_rate": 1e-2}


@pytest.fixture(scope="module")
def data(tuned: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A generated catalogue's content in float64, its texts in float32, and its split."""
    pytest.importorskip("polars")
    from mmrec.adaptation import generate_catalogue
    from mmrec.evaluation import split
    from mmrec.recommender.training import prepare_content

    folder = tmp_path_factory.mktemp("data") / "shop"
    catalogue = generate_catalogue(folder, users=37, items=24, cold_items=3, mean_length=6.0, image_size=16, seed=3)
    parts = split(catalogue, "S")
    content = prepare_content(catalogue, RecommenderConfig(**SMALL), parts.popularity > 0)
    tokens = {name: t._replace(values=t.values.double()) for name, t in content.inputs.tokens.items()}
    table = content.inputs.table
    assert table is not None
    wide = TableInputs(table.numeric.double(), *table[1:])
    text = prepare_content(catalogue, RecommenderConfig(**tuned), parts.popularity > 0)
    assert int(text.inputs.tokens["text"].offsets.diff().max()) < 4
    return {
        "content": Content(dataclasses.replace(content.inputs, tokens=tokens, table=wide), content.recipe),
        "text": dataclasses.replace(text, backbone=None),
        "split": parts,
    }


@pytest.fixture(scope="module", params=[2, 4])
def processes(
    request: pytest.FixtureRequest,
    data: dict[str, Any],
    tuned: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, list[dict[Any, Any]]]:
    """The folder of the trainings, and what each process found."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(data, folder / "data.pt")
    count = request.param
    spawn(process, args=(str(folder), count, tuned), nprocs=count)
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


@pytest.fixture(scope="module")
def alone(data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What one process finds in its trainings."""
    folder = tmp_path_factory.mktemp("alone")
    return {name: facts(trained(data, changes, folder / name, ALONE)) for name, changes in TRAININGS.items()}


@pytest.fixture(scope="module")
def tuned_alone(data: dict[str, Any], tuned: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    return facts(tuned_training(data, tuned, tmp_path_factory.mktemp("tuned"), ALONE))


def assert_same(found: dict[str, Any], wanted: dict[str, Any], **tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        same = {"check_dtype": False, "msg": lambda text, name=name: f"{name}: {text}", **tolerance}
        torch.testing.assert_close(found[name], value, **same)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", list(STEPS))
def test_gradients_of_a_step_are_those_of_one_process(processes: Any, kind: str, name: str) -> None:
    wanted = gradients(name, ALONE)
    norm = torch.linalg.vector_norm(torch.stack([v.norm() for k, v in wanted.items() if k.startswith("clipped")]))
    torch.testing.assert_close(float(norm), 0.05, rtol=1e-3, atol=0)
    for results in processes[1]:
        found = dict(results[kind, "step", name])
        if name == "parts":  # a statistic of each process's own items
            found["loss disentangle"] = wanted["loss disentangle"]
        assert_same(found, wanted, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", list(TRAININGS))
def test_curves_and_weights_are_those_of_one_process(processes: Any, alone: Any, kind: str, name: str) -> None:
    for results in processes[1]:
        assert_same(results[kind, "training", name], alone[name], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_trains_as_in_one_process(processes: Any, tuned_alone: dict[str, Any], kind: str) -> None:
    """AdamW's first steps divide small gradients by their own size: float32's rounding shows in weights more than in
    losses."""
    curves = {n: v for n, v in tuned_alone.items() if n.split()[0] in ("loss", "alignment", "valid")}
    adapter = {n: v for n, v in tuned_alone.items() if "lora_" in n}
    assert len(curves) == 6 and adapter and all(value.any() for value in adapter.values())
    for results in processes[1]:
        found = results[kind, "tuned"]
        assert_same({n: found[n] for n in curves}, curves, rtol=1e-5, atol=0)
        assert_same({n: found[n] for n in adapter}, adapter, rtol=1e-2, atol=1e-3)


def test_every_process_returns_the_same(processes: Any) -> None:
    first, *others = processes[1]
    for key in [key for key in first if isinstance(key, tuple) and key[1] in ("training", "tuned")]:
        for results in others:
            assert_same(results[key], first[key], rtol=0, atol=0)


def test_one_signal_stops_all_and_one_checkpoint_serves_any_number(
    processes: Any, alone: Any, data: Any, tmp_path: Path
) -> None:
    folder, found = processes
    for results in found:
        assert results["said"] == f"{STOP} steps, {folder / 'begun'}: saved in epoch 2; --resume goes on", results[
            "said"
        ]
        assert_same(results["ended"], alone["all items"], rtol=1e-8, atol=1e-10)
    tensors, kept = load_tensors(folder / "kept", "checkpoint")
    assert kept["counters"]["step"] == STOP and tensors["now.model.item_tower.identity"].shape == (24, 8)
    shutil.copytree(folder / "kept", tmp_path / "kept")
    ended = trained(data, TRAININGS["all items"], tmp_path / "kept", ALONE, resume=True)
    assert_same(facts(ended), alone["all items"], rtol=1e-8, atol=1e-10)


def test_with_dropout_a_resumed_training_has_the_same_bits(processes: Any, data: Any, tmp_path: Path) -> None:
    for results in processes[1]:
        assert_same(results["halves"], results["dropping"], rtol=0, atol=0)
    one = facts(trained(data, DROPPING, tmp_path, ALONE))
    assert not torch.allclose(one["loss 0"], processes[1][0]["dropping"]["loss 0"], rtol=1e-6), "other dropout"


def test_processes_draw_apart_and_together(processes: Any) -> None:
    torch.manual_seed(7)
    expected = [torch.rand(3) for _ in range(4)]
    owns = []
    for results in processes[1]:
        found = results["drawn"]
        assert all(torch.equal(common, wanted) for (_, common), wanted in zip(found, expected, strict=True))
        assert torch.equal(found[3][0], found[0][0]), "a function of seed, step and process"
        owns += [own for own, _ in found[:3]]
    values = torch.cat([*owns, *expected])
    assert len(values.unique()) == len(values)


def test_processes_that_disagree_or_fail(processes: Any) -> None:
    for rank, results in enumerate(processes[1]):
        assert results["elsewhere"] == (
            "ValueError: runs/x must be on a disk that all processes share: process 0 found step 0 there, process 1 "
            "found step 1"
        )
        text = "ValueError: invalid literal for int() with base 10: 'not a number'"
        assert results["first failed"] == (f"RuntimeError: process 0 failed ({text})" if rank else text)


@pytest.mark.parametrize(("cost", "saved"), [(1, [2, 4, 6]), (4, [2])])
def test_a_checkpoint_is_due_by_its_age_and_its_cost(
    data: Any, cost: int, saved: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step takes 40 s by this clock, and a checkpoint `cost`: a minute apart, and a fiftieth of the time."""
    clock, found = [0.0], []
    step, save = loop._Loop._step, loop.State.save

    def slow(self: loop._Loop, batch: Batch) -> float:
        clock[0] += 40
        return step(self, batch)

    def slower(self: loop.State, *arguments: Any) -> None:
        clock[0] += cost
        found.append(self.step)
        save(self, *arguments)

    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(loop._Loop, "_step", slow)
    monkeypatch.setattr(loop.State, "save", slower)
    trained(data, TRAININGS["all items"], tmp_path, ALONE)
    assert found == saved


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("lengths", [[], [4], [3, 1], [1, 9, 1, 1, 2], [2] * 9])
def test_windows_and_items_are_shared_once(count: int, lengths: list[int]) -> None:
    """Ranks made by hand: every position and every item is of one of them, and windows stay whole."""
    offsets = torch.tensor([0, *np.cumsum(lengths)]).long()
    whole = Batch(torch.arange(sum(lengths)), offsets, torch.arange(sum(lengths)) + 100)
    ranks = [Replicas.__new__(Replicas) for _ in range(count)]
    for rank, one in enumerate(ranks):
        one.rank, one.size = rank, count
    parts = [one.windows(whole) for one in ranks]
    assert torch.equal(torch.cat([part.index for part, _ in parts]), whole.index)
    assert torch.equal(torch.cat([part.target for part, _ in parts]), whole.target)
    assert torch.equal(torch.cat([part.offsets.diff() for part, _ in parts]), offsets.diff())
    assert torch.equal(torch.cat([rows for _, rows in parts if rows is not None]), whole.index)
    assert all(int(part.offsets[0]) == 0 for part, _ in parts)
    fair, longest = sum(lengths) / count, max(lengths, default=0)
    assert all(abs(len(part.index) - fair) <= longest + 1 for part, _ in parts)
    shares = [one.share(torch.arange(len(lengths))) for one in ranks]
    assert torch.cat(shares).tolist() == list(range(len(lengths)))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_ways_are_ddp_and_fsdp() -> None:
    with pytest.raises(ValueError, match=r"parallel must be one of \('ddp', 'fsdp'\), got 'zero'"):
        several("zero")


def test_a_lost_process_is_said_to_be_lost() -> None:
    ranks = Replicas.__new__(Replicas)
    words = "[/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:6. This is advice."
    with pytest.raises(ConnectionError, match=r"is gone .*\(Connection closed by peer \[127.0.0.1\]:6\); --resume"):
        with ranks.guarded():
            raise RuntimeError(words)
    with pytest.raises(RuntimeError, match="shapes") as caught, ranks.guarded():
        raise RuntimeError("shapes do not match")
    assert not isinstance(caught.value, OSError)

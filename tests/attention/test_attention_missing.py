"""Missing modalities, queries without keys, and memory that nothing references: NaN there changes nothing."""

import pytest
import torch
from attention_oracle import CASES, EVERYTHING, FLAGS, Case, both, normal, upstream

from mmrec_kernels.attention import cross_modal_attention

pytestmark = pytest.mark.usefixtures("provider")


def missing(how, dtype):
    """Modality 1 of 3 is missing from sequence 1 of 3. All float leaves but its rows are the same."""
    present = [[3, 2, 1], [2, 2, 3], [1, 4, 2]]
    case = Case(present, [2, 3, 1], extras=("value_gate", "sink", "query_norm", "key_norm"), dtype=dtype)
    case.leaves["log_bias"] = normal(3, 4, 3, seed=5, dtype=dtype)
    poisoned = slice(2, 4)
    if how == "bias":
        case.leaves["log_bias"][1, :, 1] = -torch.inf
        for name in ("key1", "value1"):
            case.leaves[name][poisoned] = torch.nan
        return case
    if how == "empty":
        case.leaves |= {n: torch.cat([case.leaves[n][:2], case.leaves[n][4:]]) for n in ("key1", "value1")}
        case.plan[1] = (torch.tensor([0, 2, 2, 5]), None, False)
    if how == "skipped":
        index = torch.tensor([0, 1, -1, -1, 4, 5, 6])
        case.plan[1] = (case.plan[1][0], index, False)
        for name in ("key1", "value1"):
            case.leaves[name][poisoned] = torch.nan
    return case


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("how", ["empty", "skipped"])
def test_a_missing_modality_is_the_same_however_it_is_said(how, dtype, provider):
    if provider == "triton" and how == "skipped":
        pytest.skip("skipped entries keep their places in a tile, and so move the order of its sums")
    biased, other = missing("bias", dtype), missing(how, dtype)
    (x, dx), (y, dy) = both(biased), both(other)
    for a, b in zip(x, y, strict=True):
        assert a.isfinite().all() and torch.equal(a, b)
    assert not x.mass[2:5, :, 1].any()
    for name in ("query", "key0", "value0", "key2", "value2", "value_gate", "sink", "query_norm", "key_norm"):
        assert dx[name].isfinite().all() and torch.equal(dx[name], dy[name]), name
    assert not dx["log_bias"][1, :, 1].any() and torch.equal(dx["log_bias"], dy["log_bias"])
    for name in ("key1", "value1"):
        assert not dx[name][2:4].any()
        kept = dy[name] if how == "empty" else torch.cat([dy[name][:2], dy[name][4:]])
        assert torch.equal(torch.cat([dx[name][:2], dx[name][4:]]), kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_segment_empty_everywhere_is_the_same_as_no_segment(dtype):
    case = Case([[3, 2], [0, 0], [1, 4]], [2, 3], dtype=dtype, extras=("sink", "key_norm"))
    absent = Case([[3, 2], [1, 4]], [2, 3], dtype=dtype, extras=("sink", "key_norm"))
    for mine, theirs in (("key0", "key0"), ("value0", "value0"), ("key1", "key2"), ("value1", "value2")):
        absent.leaves[mine] = case.leaves[theirs]
    for name in ("query", "sink", "key_norm"):
        absent.leaves[name] = case.leaves[name]
    leaves, fewer = case.to(dtype), absent.to(dtype)
    x, y = case.call(cross_modal_attention, leaves, **FLAGS), absent.call(cross_modal_attention, fewer, **FLAGS)
    assert torch.equal(x.out, y.out) and torch.equal(x.lse, y.lse) and torch.equal(x.mass[..., [0, 2]], y.mass)
    dx = torch.autograd.grad(x.out.sum() + x.lse.sum(), [leaves[n] for n in ("query", "key0", "value2", "key_norm")])
    dy = torch.autograd.grad(y.out.sum() + y.lse.sum(), [fewer[n] for n in ("query", "key0", "value1", "key_norm")])
    assert all(torch.equal(a, b) for a, b in zip(dx, dy, strict=True))


def test_a_bias_removes_one_head_of_a_group_only(provider):
    """Heads 0 and 1 share a KV head; head 0 must not meet the NaN that head 1 reads."""
    if provider == "triton":
        pytest.skip("a tile of values multiplies the rows of all heads that share it, weights of 0 by NaN too")
    case = Case([[2, 2], [2, 2]], [1, 1])
    case.leaves["log_bias"] = torch.zeros(2, 4, 2, dtype=torch.float64)
    case.leaves["log_bias"][0, 0, 1] = -torch.inf
    case.leaves["key1"][0, 0] = torch.nan
    case.leaves["value1"][1, 0] = torch.nan
    outputs, grads = both(case)
    assert outputs.out[0, 0].isfinite().all() and outputs.out[0, 1].isnan().all()
    assert outputs.mass[0, 0, 1] == 0 and outputs.mass[0, 0].isfinite().all()
    assert grads["query"][0, 0].isfinite().all() and grads["log_bias"][0, 0].isfinite().all()
    assert grads["query"][0, 2:].isfinite().all() and grads["query"][1].isfinite().all()


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("how", ["empty", "bias", "skipped", "no rows"])
@pytest.mark.parametrize("latent", [False, True])
def test_no_keys_and_no_sink(how, bad, latent):
    lengths = [[0, 0], [0, 0]] if how in ("empty", "no rows") else [[2, 2], [1, 1]]
    case = Case(lengths, None if latent else [2, 1], extras=("value_gate", "query_norm", "key_norm"),
                around=0 if how == "no rows" else 1)  # fmt: skip
    if how == "bias":
        case.leaves["log_bias"] = torch.full((2, 1, 2), -torch.inf, dtype=torch.float64)
    if how == "skipped":
        case.plan = [(o, torch.full((int(o[-1]),), -1), False) for o, _, _ in case.plan]
    leaves = case.to(torch.float64)
    outputs = case.call(cross_modal_attention, leaves, **FLAGS)
    assert not outputs.out.any() and not outputs.mass.any() and (outputs.lse == -torch.inf).all()
    for name in ("out", "lse", "mass"):
        x = getattr(outputs, name)
        grads = torch.autograd.grad(x, list(leaves.values()), torch.full_like(x, bad), retain_graph=True)
        for leaf, grad in zip(leaves, grads, strict=True):
            assert torch.equal(grad, torch.zeros_like(grad)), f"d{leaf} by d{name}"


def test_no_keys_but_a_sink():
    case = Case([[0, 2], [0, 1]], [2, 1], extras=EVERYTHING)
    leaves = case.to(torch.float64)
    outputs = case.call(cross_modal_attention, leaves, **FLAGS)
    assert not outputs.out[:2].any() and not outputs.mass[:2].any()
    assert torch.equal(outputs.lse[:2], leaves["sink"].expand(2, 4))
    g = normal(2, 4, seed=3)
    grads = dict(zip(leaves, torch.autograd.grad(outputs.lse[:2], list(leaves.values()), g), strict=True))
    assert torch.equal(grads.pop("sink"), g.sum(0))
    assert not any(grad.any() for grad in grads.values())
    leaves["query"].detach()[:2] = torch.nan
    outputs = case.call(cross_modal_attention, leaves, **FLAGS)
    grads = dict(zip(leaves, torch.autograd.grad(outputs.lse[:2], list(leaves.values()), g), strict=True))
    assert torch.equal(grads.pop("sink"), g.sum(0)) and not any(grad.any() for grad in grads.values())


def test_a_sink_of_minus_infinity_is_none():
    case = Case([[0, 2], [0, 1]], [2, 1])
    plain = case.call(cross_modal_attention, **FLAGS)
    case.leaves["sink"] = torch.full((4,), -torch.inf, dtype=torch.float64)
    outputs, grads = both(case)
    assert all(torch.equal(a, b) for a, b in zip(outputs, plain, strict=True))
    assert (outputs.lse[:2] == -torch.inf).all() and not grads["sink"].any()
    assert all(grad.isfinite().all() for grad in grads.values())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["everything", "rows around", "everything, latent", "no query in a sequence"])
def test_unreferenced_rows_change_nothing(name, bad):
    """NaN around the sequences, in rows that no index names, and in keys of a sequence without queries."""
    clean, poisoned = CASES[name](), CASES[name]()
    around = int(clean.plan[0][0][0])
    if clean.query_offsets is not None:
        outside = torch.ones(len(clean.leaves["query"]), dtype=torch.bool)
        outside[around : int(clean.query_offsets[-1])] = False
        poisoned.leaves["query"][outside] = bad
    for m, (offsets, index, _) in enumerate(clean.plan):
        outside = torch.ones(len(clean.leaves[f"key{m}"]), dtype=torch.bool)
        used = torch.arange(int(offsets[0]), int(offsets[-1])) if index is None else index[offsets[0] : offsets[-1]]
        outside[used[used >= 0]] = False
        if name == "no query in a sequence":
            outside[offsets[1] : offsets[2]] = True
        if index is not None:
            poisoned.plan[m][1][: offsets[0]] = 10**9
            poisoned.plan[m][1][offsets[-1] :] = -(10**9)
        for leaf in (f"key{m}", f"value{m}"):
            poisoned.leaves[leaf][outside] = bad
    (x, dx), (y, dy) = both(clean), both(poisoned)
    assert all(torch.equal(a, b) for a, b in zip(x, y, strict=True))
    assert all(torch.equal(dx[leaf], dy[leaf]) for leaf in dx)
    if around and clean.query_offsets is not None:
        assert not x.out[:around].any() and (x.lse[:around] == -torch.inf).all() and not x.mass[:around].any()
        assert not dx["query"][:around].any() and not dx["query"][-around:].any()
        assert not x.out[-around:].any() and (x.lse[-around:] == -torch.inf).all()


def test_gradients_of_rows_outside_are_not_read():
    case = CASES["everything"]()
    leaves = case.to(torch.float64)
    outputs = case.call(cross_modal_attention, leaves, **FLAGS)
    up = upstream(outputs)
    clean = torch.autograd.grad(list(outputs), list(leaves.values()), up, retain_graph=True)
    for u in up:
        u[0], u[-1] = torch.nan, torch.inf
    poisoned = torch.autograd.grad(list(outputs), list(leaves.values()), up)
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(clean, poisoned, strict=True))


def test_a_query_that_meets_no_key_reaches_no_gradient():
    """Causal, more queries than keys: the first rows see nothing, whatever they hold."""
    clean, poisoned = CASES["causal, more queries"](), CASES["causal, more queries"]()
    clean.plan = poisoned.plan = [(offsets, None, True) for offsets, _, _ in clean.plan]
    for case in (clean, poisoned):
        case.leaves["query_norm"] = normal(3, seed=9)
    poisoned.leaves["query"][[0, 1, 4]] = torch.nan
    (x, dx), (y, dy) = both(clean), both(poisoned)
    assert not x.out[[0, 1, 4]].any() and (x.lse[[0, 1, 4]] == -torch.inf).all()
    assert all(torch.equal(a, b) for a, b in zip(x, y, strict=True))
    assert all(torch.equal(dx[leaf], dy[leaf]) for leaf in dx)


def test_a_nan_reaches_no_missing_segment():
    """A NaN in what a query reads, or in its gradient, leaves mass and gradients of a segment that it misses at 0."""
    case = Case([[3, 1], [2, 2]], [1, 1], extras=("value_gate",))
    case.leaves["log_bias"] = torch.zeros(2, 1, 2, dtype=torch.float64)
    case.leaves["log_bias"][0, 0, 1] = -torch.inf
    case.leaves["key0"][0] = torch.nan
    outputs, grads = both(case)
    assert outputs.mass[0, :, 0].isnan().all() and not outputs.mass[0, :, 1].any()
    assert not grads["key1"][:2].any() and not grads["value1"][:2].any() and grads["log_bias"][0, 0, 1] == 0
    case.leaves["key0"][0] = 0.0
    for name in ("out", "lse", "mass"):
        leaves = case.to(torch.float64)
        result = getattr(case.call(cross_modal_attention, leaves, **FLAGS), name)
        poison = torch.zeros_like(result)
        poison[0] = torch.nan
        key, value = torch.autograd.grad(result, (leaves["key1"], leaves["value1"]), poison)
        assert not key.any() and not value.any(), name


def test_a_nan_stays_in_its_sequence():
    case = CASES["three segments"]()
    case.leaves["value0"][0] = torch.nan
    outputs, grads = both(case)
    assert outputs.out[:2].isnan().any() and outputs.out[2:].isfinite().all()
    assert grads["query"][2:].isfinite().all() and grads["key2"][2:].isfinite().all()

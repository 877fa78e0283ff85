"""Equivalent problems: permuted, split, shifted and duplicated segments."""

import pytest
import torch
from attention_oracle import CASES, FLAGS, Case, both, gradients, normal, upstream

from mmrec_kernels.attention import Segment, cross_modal_attention

pytestmark = pytest.mark.usefixtures("provider")


def test_permuting_segments_changes_nothing():
    case = CASES["everything"]()
    outputs, grads = both(case)
    order = [2, 0, 1]
    other = CASES["everything"]()
    other.plan = [case.plan[m] for m in order]
    other.leaves = dict(case.leaves)
    for new, old in enumerate(order):
        other.leaves |= {f"key{new}": case.leaves[f"key{old}"], f"value{new}": case.leaves[f"value{old}"]}
    for name in ("log_bias", "value_gate"):
        other.leaves[name] = case.leaves[name][..., order]
    leaves = other.to(torch.float64)
    permuted = other.call(cross_modal_attention, leaves, **FLAGS)
    torch.testing.assert_close(permuted.out, outputs.out)
    torch.testing.assert_close(permuted.lse, outputs.lse)
    torch.testing.assert_close(permuted.mass, outputs.mass[..., order])
    up = upstream(outputs)
    got = gradients(permuted, leaves, [up[0], up[1], up[2][..., order]])
    torch.testing.assert_close(got["key0"], grads["key2"])
    torch.testing.assert_close(got["log_bias"], grads["log_bias"][..., order])
    torch.testing.assert_close(got["query"], grads["query"])


def test_splitting_a_segment_changes_nothing():
    """Two segments over the same tensors, which share their gradients; masses add."""
    shapes = (7, 2, 3), (7, 2, 5), (3, 4, 3)
    key, value, query = (normal(*shape, seed=n).requires_grad_() for n, shape in enumerate(shapes))
    index = torch.tensor([0, 1, 2, 3, 4, 5, 6, 2, 0])
    whole = [Segment(key, value, torch.tensor([0, 5, 9]), index)]
    first = torch.tensor([0, 1, 2, 5, 6])
    second = torch.tensor([3, 4, 2, 0])
    split = [Segment(key, value, torch.tensor([0, 3, 5]), first), Segment(key, value, torch.tensor([0, 2, 4]), second)]
    offsets = torch.tensor([0, 1, 3])
    x, y = (cross_modal_attention(query, s, offsets, **FLAGS) for s in (whole, split))
    torch.testing.assert_close(x.out, y.out)
    torch.testing.assert_close(x.lse, y.lse)
    torch.testing.assert_close(x.mass, y.mass.sum(-1, keepdim=True))
    g = normal(3, 4, 5, seed=4)
    for a, b in zip(*(torch.autograd.grad(z.out, (query, key, value), g) for z in (x, y)), strict=True):
        torch.testing.assert_close(a, b)


def test_shifting_every_score_moves_only_the_lse():
    case = Case([[3, 1], [2, 2]], [2, 1])
    plain = case.call(cross_modal_attention, **FLAGS)
    for shift in (3.0, 500.0, -500.0):
        shifted = case.call(cross_modal_attention, log_bias=torch.tensor(shift, dtype=torch.float64), **FLAGS)
        torch.testing.assert_close(shifted.out, plain.out)
        torch.testing.assert_close(shifted.lse, plain.lse + shift)
        torch.testing.assert_close(shifted.mass, plain.mass)


def test_a_key_named_twice_counts_twice():
    key, value, query = normal(3, 2, 3), normal(3, 2, 5, seed=1), normal(2, 2, 3, seed=2)
    twice = Segment(key, value, torch.tensor([0, 4]), torch.tensor([0, 1, 1, 2]))
    copied = Segment(key[[0, 1, 1, 2]], value[[0, 1, 1, 2]], torch.tensor([0, 4]))
    offsets = torch.tensor([0, 2])
    torch.testing.assert_close(*(cross_modal_attention(query, [s], offsets) for s in (twice, copied)))


def test_large_scores_and_underflow():
    """A weight far below the smallest float is 0, and the row stays finite in both directions."""
    query = torch.ones(1, 1, 1, requires_grad=True)
    key = torch.tensor([1e4, 0.0, -1e4, 9999.0]).view(4, 1, 1).requires_grad_()
    value = torch.tensor([1.0, torch.finfo(torch.float32).max, 3.0, 4.0]).view(4, 1, 1)
    out = cross_modal_attention(query, [Segment(key, value, torch.tensor([0, 4]))], torch.tensor([0, 1]), **FLAGS)
    weights = torch.tensor([0.0, -1.0]).softmax(0)
    torch.testing.assert_close(out.out.flatten(), (weights @ torch.tensor([1.0, 4.0]))[None])
    out.out.sum().backward()
    assert key.grad[1] == 0 and key.grad[2] == 0 and key.grad.isfinite().all() and query.grad.isfinite().all()

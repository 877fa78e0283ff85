from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmrec.fusion import ModalityMoE
from mmrec_kernels import RouterLosses

WIDTH, MODALITIES = 6, 3


def module(**changes: int | float | str) -> ModalityMoE:
    settings: dict = {"shared": 2, "private": 2, "hidden": 5, "k": 2, **changes}
    moe = ModalityMoE(WIDTH, MODALITIES, **settings).double()
    with torch.no_grad():
        moe.w_out.normal_()  # from the zeros that it starts with
    return moe


def test_starts_as_the_identity() -> None:
    x, modality = inputs()
    y, _ = ModalityMoE(WIDTH, MODALITIES).double()(x, modality)
    assert torch.equal(y, x)


def inputs() -> tuple[Tensor, Tensor]:
    modality = torch.tensor([0, 1, 2, -1, 0, 2, 1, -1, 1, 0, 2])
    return torch.randn(len(modality), WIDTH, dtype=torch.float64), modality


def may_use(modality: int) -> list[int]:
    """Shared experts 0 and 1; then two private experts for each modality in turn."""
    return [0, 1, 2 + 2 * modality, 3 + 2 * modality]


def by_hand(moe: ModalityMoE, x: Tensor, modality: Tensor) -> Tensor:
    """Token by token: softmax over the allowed experts, the best k, weights that sum to 1, SwiGLU."""
    rows = []
    for row, name in zip(x, modality.tolist(), strict=True):
        if name < 0:
            rows.append(row)
            continue
        normed = F.layer_norm(row, (WIDTH,), moe.norm.weight, moe.norm.bias)
        experts = may_use(name)
        share, best = (moe.gate[experts] @ normed).softmax(0).topk(moe.k)
        mixed = torch.zeros_like(row)
        for weight, place in zip(share / share.sum(), best.tolist(), strict=True):
            gate, up = (moe.w_in[experts[place]] @ normed).chunk(2)
            mixed = mixed + weight * (moe.w_out[experts[place]] @ (F.silu(gate) * up))
        rows.append(row + mixed)
    return torch.stack(rows)


@pytest.mark.parametrize("k", [2, 3])
def test_equals_the_formula_token_by_token(k: int) -> None:
    moe, (x, modality) = module(k=k), inputs()
    torch.testing.assert_close(moe(x, modality)[0], by_hand(moe, x, modality))


def test_a_token_uses_shared_experts_and_its_own_modalitys_only() -> None:
    moe, (x, modality) = module(k=4), inputs()
    _, routing = moe(x, modality)
    for experts, name in zip(routing.experts.tolist(), modality.tolist(), strict=True):
        assert sorted(experts) == (may_use(name) if name >= 0 else [-1] * 4)
    assert routing.stats[..., 0].sum(1).tolist() == [4.0 * int((modality == m).sum()) for m in range(MODALITIES)]


def test_an_absent_token_passes_through_unchanged_and_without_gradient() -> None:
    moe, (x, modality) = module(), inputs()
    absent = modality < 0
    out, _ = moe(x, modality)
    assert torch.equal(out[absent], x[absent]) and not torch.equal(out[~absent], x[~absent])
    out[absent].sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in moe.parameters())


def test_private_experts_get_their_gradient_from_their_modality_alone() -> None:
    moe, (x, modality) = module(k=4), inputs()
    out, _ = moe(x, modality)
    out[modality == 1].square().sum().backward()
    assert moe.w_in.grad is not None
    touched = moe.w_in.grad.flatten(1).any(1).nonzero()[:, 0].tolist()
    assert touched == may_use(1)


def test_gradcheck() -> None:
    moe, (x, modality) = module(k=4), inputs()
    names, values = zip(*moe.named_parameters(), strict=True)

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        out, routing = torch.func.functional_call(moe, dict(zip(names, parameters, strict=True)), (x, modality))
        return torch.cat([out.flatten(), routing.losses.balance, routing.losses.z])

    leaves = [value.detach().requires_grad_() for value in (x, *values)]
    assert torch.autograd.gradcheck(run, tuple(leaves), fast_mode=True)


def test_penalty_is_the_weighted_mean_over_modalities() -> None:
    balance, z = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([4.0, 0.0, 2.0])
    losses = RouterLosses(balance, z, torch.tensor([0.5, 1.5, 1.0]), torch.tensor([3.0, 1.0, 2.0]))
    assert ModalityMoE.penalty(losses, 0.1, 0.01).item() == pytest.approx(0.1 * 3.0 + 0.01 * 2.0)
    penalty = ModalityMoE.penalty(losses, 0.1, 0.01, local_entropy=0.2, global_entropy=0.05)
    assert penalty.item() == pytest.approx(0.32 + 0.2 * 1.0 - 0.05 * 2.0)


@pytest.mark.parametrize("score", ["softmax", "topk_softmax", "sigmoid"])
def test_the_bias_moves_towards_balance_and_changes_no_weight_of_a_choice(score: str) -> None:
    """A router that sends all to one shared expert: its bias falls step by step until others are chosen as well."""
    moe = module(k=1, private=1, score=score, bias_rate=0.02)
    with torch.no_grad():
        moe.norm.bias.fill_(1.0)
        moe.gate.mul_(0.3)[0] += 0.3
    x, modality = torch.randn(600, WIDTH, dtype=torch.float64), torch.arange(600) % MODALITIES
    assert moe.bias is not None and not moe.bias.any()
    first = moe(x, modality)[1]
    assert (first.experts == 0).all()
    moe.update_bias(first.stats[..., 0])
    one_step = 0.02 * moe.allowed.double()
    one_step[:, 0] = -0.02
    assert torch.equal(moe.bias, one_step)
    for _ in range(80):
        moe.update_bias(moe(x, modality)[1].stats[..., 0])
    assert not moe.bias[~moe.allowed].any()
    last = moe(x, modality)[1]
    assert (last.stats[..., 0].amax(1) < 150).all()
    plain = module(k=1, private=1, score=score)
    plain.load_state_dict({n: v for n, v in moe.state_dict().items() if n != "bias"})
    same = plain(x, modality)[1].experts == last.experts
    assert torch.equal(plain(x, modality)[1].weights[same], last.weights[same]) and not same.all()


def test_equal_counts_and_absent_modalities_leave_the_bias_where_it_is() -> None:
    moe = module(bias_rate=0.1)
    moe.update_bias(torch.stack([torch.zeros(8), torch.full((8,), 3.0), torch.tensor([4.0, 4, 0, 0, 0, 0, 2, 2])]))
    assert moe.bias is not None
    assert not moe.bias[0].any() and not moe.bias[1, [2, 3, 6, 7]].any()
    assert moe.bias[2].tolist() == [-0.1, -0.1, 0, 0, 0, 0, 0.1, 0.1]


def test_the_bias_is_saved_and_without_a_rate_there_is_none() -> None:
    assert "bias" in module(bias_rate=0.1).state_dict()
    moe = module()
    moe.update_bias(torch.ones(3, 8))
    assert moe.bias is None and "bias" not in moe.state_dict()
    half = module(bias_rate=0.001).bfloat16()
    assert half.bias is not None and half.bias.dtype == torch.float64 and half.gate.dtype == torch.bfloat16
    half(torch.zeros(3, WIDTH).bfloat16(), torch.arange(3))
    with pytest.raises(ValueError, match=r"counts must have shape \[3, 8\], got \[8\]"):
        moe.update_bias(torch.ones(8))


def test_the_balance_loss_punishes_a_collapsed_router() -> None:
    moe, (x, modality) = module(k=1, private=1), inputs()
    even = moe(x, modality)[1].losses.balance
    with torch.no_grad():
        moe.norm.weight.zero_()
        moe.norm.bias.fill_(1.0)
        moe.gate[1:] -= 5.0
        moe.gate[0] += 5.0
    collapsed = moe(x, modality)[1].losses.balance
    assert (collapsed > even).all()
    torch.testing.assert_close(collapsed, torch.full((3,), 3.0).double(), rtol=1e-3, atol=0)


def test_dropout_acts_on_the_mixture_only() -> None:
    moe, (x, modality) = module(dropout=0.5), inputs()
    dropped = (moe(x, modality)[0] == x)[modality >= 0].double().mean()
    assert 0.2 < dropped < 0.8
    moe.eval()
    torch.testing.assert_close(moe(x, modality)[0], by_hand(moe, x, modality))


def test_no_tokens() -> None:
    out, routing = module()(torch.zeros(0, WIDTH).double(), torch.zeros(0, dtype=torch.int64))
    assert out.shape == (0, WIDTH) and routing.losses.balance.tolist() == [0.0] * 3


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"k": 0}, r"k must be in \[1, shared \+ private = 4\], got 0"),
        ({"k": 5}, r"k must be in \[1, shared \+ private = 4\], got 5"),
        ({"score": "relu"}, "score must be one of .*'sigmoid'.*, got 'relu'"),
        ({"bias_rate": -1.0}, "bias_rate must be finite and ≥ 0, got -1.0"),
        ({"shared": -1}, "shared and private must be ≥ 0, got -1 and 2"),
        ({"private": -1}, "shared and private must be ≥ 0, got 2 and -1"),
    ],
)
def test_bad_sizes(bad: dict[str, float | str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(**bad)

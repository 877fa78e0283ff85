"""The raw ops over a part of the keys: what parts find, put together, is what the whole finds. `ring=` stands on it."""

from __future__ import annotations

import pytest
import torch
from test_infonce_kernel import everything, unit
from torch import Tensor

from mmrec_kernels import schemas
from mmrec_kernels.infonce import autograd
from mmrec_kernels.infonce.autograd import Problem
from numerics import errors

ROWS, OWN, OTHER, WIDTH = 130, 150, 210, 24  # several tiles of rows and keys
LIMITS = {torch.float32: 5e-6, torch.bfloat16: torch.finfo(torch.bfloat16).eps, torch.float64: 1e-12}


def problems(dtype: torch.dtype, symmetric: bool) -> tuple[Problem, Problem, Problem]:
    """A batch, its rows with the keys that hold their positives, and its rows with the others; copies among these."""
    # On a grid on which products and their sums are exact: a copy's logit is its original's in whatever order they are
    # added up (the interpreter's products are those of numpy's BLAS, where the order can depend on the column).
    query, key = ((64 * x).round() / 64 for x in (unit(ROWS, WIDTH, dtype, 1), unit(OWN + OTHER, WIDTH, dtype, 2) * 2))
    options = everything(ROWS, OWN, dtype)
    key[OWN : OWN + 100], log_q = key[:100], torch.randn(OWN + OTHER, generator=torch.Generator().manual_seed(3))
    log_q[OWN : OWN + 100] = log_q[:100]
    log_q = log_q.to(options["scale"].dtype)
    ids = torch.cat([options["key_ids"], torch.randint(-1, 40, (OTHER,))])
    target, mask = options["target"], torch.ones(OWN + OTHER, dtype=torch.bool)
    mask[[3, OWN + 5]] = False
    query_ids = torch.where(target >= 0, ids[target], -1)
    whole = Problem(query, key, options["scale"], target, None, mask, query_ids, ids, *options["exclude"], log_q,
                    symmetric, True)  # fmt: skip
    own = whole._replace(key=key[:OWN], key_mask=mask[:OWN], key_ids=ids[:OWN], log_q=log_q[:OWN])
    has_term = (target >= 0) & mask[target]
    others = whole._replace(
        key=key[OWN:], key_mask=mask[OWN:], key_ids=ids[OWN:], log_q=log_q[OWN:], target=None,
        query_mask=None if symmetric else has_term, exclude_offsets=None, exclude_positions=None,
        positives_elsewhere=True,
    )  # fmt: skip
    return whole, own, others


def forward(problem: Problem, reference: Tensor | None) -> tuple[Tensor, ...]:
    return autograd.library.call(schemas.infonce_forward, *problem, reference, True, True, True, 2**30)


def check_parts(dtype: torch.dtype, symmetric: bool, limit: float) -> None:
    whole, own, others = problems(dtype, symmetric)
    expected, mine = forward(whole, None), forward(own, None)
    rest = forward(others, mine[6])
    _, row_lse, column_lse, total, kept, rank, _, saved = expected
    terms = (whole.target >= 0) & whole.key_mask[whole.target]
    assert 90 < int(terms.sum()) < ROWS and not rest[0].any()

    def of_terms(x: Tensor, nothing: float) -> Tensor:
        return x.masked_fill(~terms, nothing)

    found = of_terms(torch.logsumexp(torch.stack([mine[1], rest[1]]), 0), -torch.inf)
    torch.testing.assert_close(found, row_lse, rtol=limit, atol=limit)
    torch.testing.assert_close(torch.cat([mine[2], rest[2]]), column_lse, rtol=limit, atol=limit)
    torch.testing.assert_close(mine[3] + of_terms(rest[3], 0), total, rtol=limit, atol=limit * 1e3)
    assert torch.equal(mine[4] + of_terms(rest[4], 0), kept)
    # Copies of the positive lie among the others: they rank as it does, to the last bit of a logit.
    assert torch.equal(mine[5] + of_terms(rest[5], 0), rank) and rank.max() > 20

    generator = torch.Generator().manual_seed(4)
    up = [torch.rand(ROWS, generator=generator, dtype=row_lse.dtype) for _ in range(3)]
    up_columns = torch.rand(OWN + OTHER, generator=generator, dtype=row_lse.dtype)
    needs, positive, row, both = (True,) * 4, up[0], of_terms(up[1], 0), of_terms(up[2], 0)

    def backward(p: Problem, positive: Tensor | None, keys: slice, saved: Tensor) -> tuple[Tensor, ...]:
        of_columns = (up_columns[keys], column_lse[keys]) if symmetric else (None, column_lse)
        return autograd.library.call(schemas.infonce_backward, positive, row, of_columns[0], both, *p, row_lse,
                                     of_columns[1], saved, *needs, 2**30)  # fmt: skip

    dquery, dkey, dscale, dlog_q = backward(whole, positive, slice(None), saved)
    of_own = backward(own, positive, slice(OWN), mine[7])
    of_others = backward(others, None, slice(OWN, None), rest[7])
    assert errors(of_own[0].double() + of_others[0].double(), dquery.double())[1] <= LIMITS[dtype]
    assert errors(torch.cat([of_own[1], of_others[1]]), dkey)[1] <= LIMITS[dtype]
    assert errors(of_own[2] + of_others[2], dscale)[1] <= LIMITS[dtype]
    assert errors(torch.cat([of_own[3], of_others[3]]), dlog_q)[1] <= LIMITS[dtype]


@pytest.mark.usefixtures("provider")
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_parts_make_the_whole(dtype: torch.dtype, symmetric: bool) -> None:
    check_parts(dtype, symmetric, 1e-12 if dtype == torch.float64 else 2e-6)

"""Bad arguments of `info_nce` raise one clear error that names them."""

from __future__ import annotations

import pytest
import torch

from mmrec_kernels.infonce import info_nce

LONG = torch.int64


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"query": [[1.0]]}, TypeError, "query must be a tensor, got list"),
        ({"query": torch.zeros(3)}, ValueError, r"query must have shape \[Nq, D\], got \[3\]"),
        ({"query": torch.zeros(3, 4, dtype=LONG)}, TypeError, "query must be float32"),
        ({"query": torch.zeros(3, 4).half()}, TypeError, "query must be float32 or bfloat16 or float64, got float16"),
        ({"key": torch.zeros(5, 3)}, ValueError, r"key must have shape \[Nk, 4\], got \[5, 3\]"),
        ({"key": torch.zeros(5, 4).double()}, TypeError, "key must be float32, got float64"),
        ({"key": torch.zeros(5, 4, device="meta")}, ValueError, "key must be on cpu, got meta"),
        ({"key": torch.zeros(2, 4)}, ValueError, "key must have at least as many rows as query .* got 2 and 3"),
        ({"scale": "hot"}, TypeError, "scale must be a float or a tensor, got str"),
        ({"scale": True}, TypeError, "scale"),
        ({"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
        ({"scale": torch.ones(2)}, ValueError, r"scale must have shape \[\] or \[3\], got \[2\]"),
        ({"scale": torch.ones(3, 1)}, ValueError, "scale"),
        ({"scale": torch.ones(3, dtype=LONG)}, TypeError, "scale must be float32"),
        ({"symmetric": None}, TypeError, "symmetric must be a bool, got NoneType"),
        ({"normalize": torch.tensor(True)}, TypeError, "normalize must be a bool, got Tensor"),
        ({"return_stats": 1}, TypeError, "return_stats must be a bool, got int"),
        ({"target": torch.zeros(2, dtype=LONG)}, ValueError, r"target must have shape \[3\], got \[2\]"),
        ({"target": torch.zeros(3)}, TypeError, "target must be int32 or int64, got float32"),
        ({"target": torch.tensor([0, 5, 1])}, ValueError, "target must be below the number of keys, 5, got 5"),
        ({"key_ids": torch.zeros(3, dtype=LONG)}, ValueError, r"key_ids must have shape \[5\]"),
        ({"query_ids": torch.zeros(3, dtype=LONG)}, ValueError, "query_ids must be None unless key_ids is given"),
        ({"key_ids": torch.zeros(5, dtype=LONG), "query_ids": torch.zeros(5, dtype=LONG)}, ValueError, "query_ids"),
        ({"exclude": torch.zeros(4, dtype=LONG)}, TypeError, "exclude must be a pair"),
        ({"exclude": (torch.zeros(3, dtype=LONG), torch.zeros(0, dtype=LONG))}, ValueError, r"exclude\[0\]"),
        ({"exclude": (torch.zeros(4, dtype=LONG), torch.zeros(0))}, TypeError, r"exclude\[1\]"),
        ({"exclude": (torch.tensor([0, 1, 0, 1]), torch.tensor([1]))}, ValueError, r"exclude\[0\] must be non-decr"),
        ({"exclude": (torch.tensor([0, 0, 0, 2]), torch.tensor([1]))}, ValueError, r"exclude\[0\]"),
        ({"exclude": (torch.tensor([0, 0, 0, 1]), torch.tensor([5]))}, ValueError, r"exclude\[1\] must be below .* 5"),
        ({"log_q": torch.zeros(3)}, ValueError, r"log_q must have shape \[5\]"),
        ({"log_q": torch.zeros(5, dtype=LONG)}, TypeError, "log_q"),
        ({"weight": torch.zeros(5)}, ValueError, r"weight must have shape \[3\]"),
        ({"weight": [1, 1, 1]}, TypeError, "weight must be a tensor, got list"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
        ({"label_smoothing": -0.1}, ValueError, "label_smoothing"),
        ({"label_smoothing": "a"}, TypeError, "label_smoothing must be a float, got str"),
        ({"reduction": "max"}, ValueError, "reduction must be one of 'mean', 'sum', 'none', got 'max'"),
        ({"workspace_bytes": 0}, ValueError, "workspace_bytes must be at least 1, got 0"),
        ({"workspace_bytes": 1e9}, TypeError, "workspace_bytes must be an int, got float"),
        ({"group": 3}, TypeError, "group must be a torch.distributed.ProcessGroup, got int"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(options: dict[str, object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        info_nce(**{"query": torch.zeros(3, 4), "key": torch.zeros(5, 4), **options})


@pytest.mark.parametrize("requires_grad", [True, False])
def test_contents_are_checked_with_and_without_a_gradient(requires_grad: bool) -> None:
    query = torch.zeros(3, 4, requires_grad=requires_grad)
    with pytest.raises(ValueError, match="target"):
        info_nce(query, torch.zeros(5, 4), target=torch.tensor([0, 1, 7]))

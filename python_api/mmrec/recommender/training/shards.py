"""Weights, gradients and moments in parts on the ranks: FSDP2's `fully_shard` around a whole step.

One group of parameters: they are gathered when a step begins and thrown away when its backward ends, so a rank holds
whole weights during a step, and gradients, moments and weights between steps in parts. Cutting it finer would save
little: the largest parameter, the identities, is read as a whole, and the number of a backbone's passes per step
differs between ranks, so that its blocks could not be gathered one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ..parallel import Replicas

__all__ = ["Shards"]


class Shards(Replicas):
    """Scalars, which cannot be cut, and weights that do not train, such as those of a quantised backbone, are whole on
    every rank."""

    sharded = True

    def wrap(self, step: nn.Module, *, unused: bool) -> nn.Module:
        mesh = DeviceMesh.from_group(self._reducing, "cpu")
        whole = {p for p in step.parameters() if p.ndim == 0 or not p.requires_grad}
        fully_shard(step, mesh=mesh, ignored_params=whole)
        return step

    def settle(self, parameters: Sequence[nn.Parameter]) -> None:
        grads = [p.grad for p in parameters if p.grad is not None and not isinstance(p, DTensor)]
        if not grads:
            return
        told = torch.cat([grad.reshape(-1) for grad in grads])
        distributed.all_reduce(told, group=self._group)
        for grad, mean in zip(grads, told.div_(self.size).split([g.numel() for g in grads]), strict=True):
            grad.copy_(mean.view_as(grad))

    def clip(self, parameters: Sequence[nn.Parameter], most: float) -> None:
        cut = [p for p in parameters if isinstance(p, DTensor)]
        whole = [p for p in parameters if not isinstance(p, DTensor)]
        norms = []
        for part in (cut, whole):
            norm = nn.utils.get_total_norm([p.grad for p in part if p.grad is not None])
            norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        total = torch.linalg.vector_norm(torch.stack(norms))
        for part in (cut, whole):
            nn.utils.clip_grads_with_norm_(part, most, total)

    @contextmanager
    def whole(self, step: nn.Module) -> Iterator[None]:
        assert isinstance(step, FSDPModule)
        step.unshard()
        try:
            yield
        finally:
            step.reshard()

    def full(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in tensors.items()}

    def parts(self, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: _cut(x, like.get(name)) for name, x in tensors.items()}


def _cut(whole: Tensor, like: Tensor | None) -> Tensor:
    if not isinstance(like, DTensor):
        return whole
    # Every rank has the whole: nothing needs to be sent.
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)

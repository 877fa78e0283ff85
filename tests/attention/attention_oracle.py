"""An independent oracle of cross-modal attention: one query row and head at a time, gradients by autograd."""

import torch
from torch.nn.functional import rms_norm

from mmrec_kernels.attention import Segment, cross_modal_attention

FLAGS = {"return_lse": True, "return_mass": True}


def oracle(
    query, segments, query_offsets=None, *, log_bias=None, value_gate=None, sink=None, scale=None, query_norm=None,
    key_norm=None, norm_eps=1e-6,
):  # fmt: skip
    """`(out, lse, mass)` in the dtype of `query`, by the words of the contract."""
    batch, count = len(segments[0].offsets) - 1, len(segments)
    if query_offsets is None:
        rows, length = query.repeat(batch, 1, 1), len(query)
        query_offsets = torch.arange(batch + 1) * length
    else:
        rows = query
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    heads, kv_heads = query.shape[1], segments[0].key.shape[1]
    bias, gate = (None if x is None else x.expand(batch, heads, count) for x in (log_bias, value_gate))
    nothing = query.new_zeros(segments[0].value.shape[2]), query.new_tensor(-torch.inf), query.new_zeros(count)
    results = [[nothing] * heads for _ in range(len(rows))]
    for b in range(batch):
        first, last = int(query_offsets[b]), int(query_offsets[b + 1])
        for i in range(last - first):
            for h in range(heads):
                seen = [_seen(segment, b, i, last - first) for segment in segments]
                if bias is not None:
                    seen = [[] if bias[b, h, m] == -torch.inf else rows_m for m, rows_m in enumerate(seen)]
                q = rows[first + i, h]
                q = q if query_norm is None else rms_norm(q, q.shape, query_norm, norm_eps)
                scores, values = [], []
                for m, (segment, rows_m) in enumerate(zip(segments, seen, strict=True)):
                    k = segment.key[rows_m, h // (heads // kv_heads)]
                    k = k if key_norm is None else rms_norm(k, k.shape[-1:], key_norm, norm_eps)
                    scores.append(k @ q * scale + (0 if bias is None else bias[b, h, m]))
                    v = segment.value[rows_m, h // (heads // kv_heads)]
                    values.append(v if gate is None else v * (gate[b, h, m] if rows_m else 1))
                results[first + i][h] = _attend(scores, values, None if sink is None else sink[h])

    def stack(n):
        return torch.stack([torch.stack([r[n] for r in row]) for row in results])

    if not len(rows):
        width = segments[0].value.shape[2]
        return query.new_zeros(0, heads, width), query.new_zeros(0, heads), query.new_zeros(0, heads, count)
    return stack(0), stack(1), stack(2)


def _seen(segment, b, i, n_queries):
    start, stop = int(segment.offsets[b]), int(segment.offsets[b + 1])
    n_keys = stop - start
    positions = [j for j in range(n_keys) if not segment.causal or j <= i + n_keys - n_queries]
    rows = [start + j for j in positions]
    return rows if segment.index is None else [int(segment.index[r]) for r in rows if segment.index[r] >= 0]


def _attend(scores, values, sink):
    union = torch.cat([*scores, *([] if sink is None else [sink[None].to(scores[0].dtype)])])
    if not len(union):
        none = scores[0].new_zeros(len(scores))
        return values[0].new_zeros(values[0].shape[1]), scores[0].new_tensor(-torch.inf), none
    weights = union.softmax(0)
    parts = weights[: sum(map(len, scores))].split([len(s) for s in scores])
    out = sum((p @ v for p, v in zip(parts, values, strict=True)), values[0].new_zeros(values[0].shape[1]))
    return out, union.logsumexp(0), torch.stack([p.sum() for p in parts])


NAMES = ("query", "log_bias", "value_gate", "sink", "query_norm", "key_norm")


class Case:
    """A random problem: `leaves` are its float tensors by name, `call` runs a function on them or on substitutes."""

    def __init__(
        self, lengths, query_lengths=None, *, heads=4, kv_heads=2, width=3, value_width=5, latent=2, indexed=(),
        causal=(), extras=(), around=0, dtype=torch.float64, seed=0,
    ):  # fmt: skip
        """`lengths [M][B]`; `query_lengths [B]`, or None for `latent` shared queries; `extras` out of the names above;
        `around`: rows before and after what the offsets reference."""
        g = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

        def offsets(lens):
            return torch.tensor([around, *lens]).cumsum(0)

        batch, count = len(lengths[0]), len(lengths)
        self.query_offsets = None if query_lengths is None else offsets(query_lengths)
        total = latent if query_lengths is None else sum(query_lengths) + 2 * around
        self.leaves = {"query": normal(total, heads, width)}
        shapes = {"log_bias": (batch, 1, count), "value_gate": (1, heads, count), "sink": (heads,),
                  "query_norm": (width,), "key_norm": (width,)}  # fmt: skip
        self.leaves |= {name: normal(*shapes[name]) for name in extras}
        self.plan = []
        for m, lens in enumerate(lengths):
            entries = sum(lens) + 2 * around
            rows, index = entries, None
            if m in indexed:
                rows = max(2, entries // 2)
                index = torch.randint(-1, rows, (entries,), generator=g)
            self.plan.append((offsets(lens), index, m in causal))
            self.leaves[f"key{m}"] = normal(rows, kv_heads, width)
            self.leaves[f"value{m}"] = normal(rows, kv_heads, value_width)

    def call(self, function, leaves=None, **more):
        x = self.leaves if leaves is None else leaves
        segments = [Segment(x[f"key{m}"], x[f"value{m}"], *rest) for m, rest in enumerate(self.plan)]
        small = {name: x[name] for name in NAMES[1:] if name in x}
        return function(x["query"], segments, self.query_offsets, **small, **more)

    def to(self, dtype):
        """Fresh leaves in `dtype` that require gradients."""
        return {name: x.detach().to(dtype).requires_grad_() for name, x in self.leaves.items()}


EVERYTHING = ("log_bias", "value_gate", "sink", "query_norm", "key_norm")
CASES = {
    "one equal segment": lambda **k: Case([[3, 3]], [2, 2], **k),
    "one ragged segment": lambda **k: Case([[3, 0, 1]], [1, 2, 3], **k),
    "no query in a sequence": lambda **k: Case([[3, 2, 1]], [1, 0, 2], extras=("key_norm",), **k),
    "three segments": lambda **k: Case([[3, 1], [0, 2], [2, 2]], [2, 1], **k),
    "latent queries": lambda **k: Case([[3, 1, 0], [2, 2, 2]], **k),
    "latent queries, one sequence": lambda **k: Case([[3], [2]], **k),
    "indexed": lambda **k: Case([[4, 1], [3, 3]], [1, 2], indexed=(0, 1), **k),
    "causal, more keys": lambda **k: Case([[4, 3]], [2, 2], causal=(0,), **k),
    "causal, more queries": lambda **k: Case([[2, 1], [1, 1]], [4, 2], causal=(0,), **k),
    "causal and indexed": lambda **k: Case([[4, 3], [2, 0]], [3, 3], causal=(0, 1), indexed=(0,), **k),
    "causal latent queries": lambda **k: Case([[4, 1, 2]], causal=(0,), latent=3, **k),
    "one KV head": lambda **k: Case([[2, 1]], [2, 2], kv_heads=1, **k),
    "rows around": lambda **k: Case([[2, 1], [0, 3]], [1, 2], around=2, indexed=(1,), **k),
    "everything": lambda **k: Case([[3, 0, 2], [2, 4, 0], [1, 1, 1]], [2, 3, 1], indexed=(1,), causal=(0,),
                                   extras=EVERYTHING, around=1, **k),
    "everything, latent": lambda **k: Case([[3, 0, 2], [2, 4, 0]], indexed=(1,), extras=EVERYTHING, **k),
    "no keys at all": lambda **k: Case([[0, 0], [0, 0]], [1, 2], extras=EVERYTHING, **k),
}  # fmt: skip


def gradients(outputs, leaves, upstream):
    """Gradients of Σ upstream·output over the finite outputs; zeros where a leaf is not reached."""
    loss = sum((torch.where(x.isfinite(), x, 0) * u.to(x.dtype)).sum() for x, u in zip(outputs, upstream, strict=True))
    if not loss.requires_grad:
        return {n: torch.zeros_like(x) for n, x in leaves.items()}
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(leaves.items(), grads, strict=True)}


def upstream(outputs, seed=7):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(x.shape, generator=g, dtype=torch.float64) for x in outputs]


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def both(case, **more):
    """Outputs and gradients of the op."""
    leaves = case.to(case.leaves["query"].dtype)
    outputs = case.call(cross_modal_attention, leaves, **FLAGS, **more)
    return outputs, gradients(outputs, leaves, upstream(outputs))

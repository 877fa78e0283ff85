"""InfoNCE: the launchers of the Triton kernels, for CUDA tensors (CPU tensors in the interpreter).

Nothing of size Nq·Nk is kept from the forward; the backward makes the logits again. Sizes are arguments of the kernels,
so that no batch size compiles anew, and no tensor is read back.
"""

from .backward_pass import backward
from .forward_pass import forward
from .prepare import block_sizes

__all__ = ["backward", "block_sizes", "forward"]

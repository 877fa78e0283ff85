"""The NF4 linear on GPU: the launchers of the Triton kernels, for CUDA tensors (CPU tensors in the interpreter).

Sizes of tiles come from shapes alone and no tensor is read back.
"""

from .passes import backward, dequantize, forward

__all__ = ["backward", "dequantize", "forward"]

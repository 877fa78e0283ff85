"""Cross-modal attention: the launchers of the Triton kernels, for CUDA tensors (CPU tensors in the interpreter).

Sizes of tiles come from shapes alone, lengths stay on the device: no tensor is read back.
"""

from .backward_pass import backward
from .forward_pass import forward
from .prepare import block_sizes

__all__ = ["backward", "block_sizes", "forward"]

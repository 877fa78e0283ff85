"""Routing and experts on GPU: the launchers of the Triton kernels, for CUDA tensors (CPU tensors in the interpreter).

Sizes of tiles come from shapes alone, ids and counts stay on the device: no tensor is read back.
"""

from .experts_pass import backward as experts_backward
from .experts_pass import forward as experts_forward
from .router_pass import backward as route_backward
from .router_pass import forward as route_forward

__all__ = ["experts_backward", "experts_forward", "route_backward", "route_forward"]

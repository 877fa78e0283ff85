"""Multimodal recommenders with a quantised language model behind them, built on :mod:`mmrec_kernels`.

Wings: :mod:`mmrec.adaptation` (catalogues; tables and images to text and arrays), :mod:`mmrec.llm` (backbones),
:mod:`mmrec.fusion` (disentangle, align, fuse), :mod:`mmrec.recommender` (model, training, serving) and
:mod:`mmrec.evaluation` (protocols, metrics, reports). Importing this package imports none of them.
"""

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`mmrec.swap_kernels`, without importing :mod:`mmrec.llm` before it is asked for."""
    if name == "swap_kernels":
        from .llm.swap import swap_kernels

        return swap_kernels
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

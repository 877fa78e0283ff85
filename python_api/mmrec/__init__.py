"""Multimodal recommenders with a quantised language model behind them, built on :mod:`mmrec_kernels`.

Wings: :mod:`mmrec.adaptation` (catalogues; tables and images to text and arrays), :mod:`mmrec.llm` (backbones),
:mod:`mmrec.fusion` (disentangle, align, fuse), :mod:`mmrec.recommender` (model, training, serving) and
:mod:`mmrec.evaluation` (protocols, metrics, reports). Importing this package imports none of them.
"""

__version__ = "0.1.0"

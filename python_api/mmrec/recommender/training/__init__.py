"""Training: content of a catalogue as tensors, checkpoints, the loop."""

from ..parallel import several
from .features import Content, Recipe, load_backbone, prepare_content
from .loop import Progress, Trained, train

__all__ = ["Content", "Progress", "Recipe", "Trained", "load_backbone", "prepare_content", "several", "train"]

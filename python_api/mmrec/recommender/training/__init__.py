"""Training: content of a catalogue as tensors, checkpoints, the loop."""

from .features import Content, prepare_content
from .loop import Progress, Trained, train

__all__ = ["Content", "Progress", "Trained", "prepare_content", "train"]

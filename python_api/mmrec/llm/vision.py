"""`VisionEncoder`: any Hugging Face vision model, images to patch tokens or one vector per image."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .encoded import Encoded
from .extras import progress_bar, quiet_transformers, require
from .fingerprint import ModelHash
from .loading import first_line, load_checked, load_config, model_kwargs

if TYPE_CHECKING:
    from PIL.Image import Image

    from .cache import EmbeddingCache

POOLINGS = ("mean", "cls", "tokens")


class VisionEncoder:
    """A frozen vision model (ViT, CLIP and SigLIP vision towers, DINOv2, ConvNeXt, …). Build with `VisionEncoder.load`.

    Attributes:
        model, processor: the transformers objects.
        name: what it was loaded from.
        hidden_size: width d of the vectors.
    """

    def __init__(self, model: Any, processor: Any, *, name: str) -> None:
        self.model = model.eval().requires_grad_(False)
        self.processor = processor
        self.name = name
        self.hidden_size = _width(model.config)
        self._hash = ModelHash()

    @classmethod
    def load(
        cls, name_or_path: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> VisionEncoder:
        """Load a model and its image processor by folder (no network) or Hugging Face name.

        Of a two-tower checkpoint (CLIP, SigLIP) the vision tower is taken. Raises ValueError if there is no such
        model, if weights are missing from it, or if it does not take images; ImportError if an extra is missing.
        """
        require("PIL")
        source = str(name_or_path)
        config = load_config(source)
        if getattr(config, "vision_config", None) is not None:
            config = config.vision_config
        try:
            with quiet_transformers():
                # The PIL backend: torchvision is not among the extras.
                processor = require("transformers").AutoImageProcessor.from_pretrained(source, backend="pil")
        except (OSError, ValueError, ImportError) as error:
            raise ValueError(f"name_or_path: no image processor for {source!r}: {first_line(error)}") from error
        model = load_checked("AutoModel", source, config, dtype=dtype, **model_kwargs(config)).to(device)
        if getattr(model, "main_input_name", None) != "pixel_values":
            raise ValueError(f"name_or_path: {source!r} does not take images ({type(model).__name__})")
        return cls(model, processor, name=source)

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return next(self.model.parameters()).device

    def encode(
        self,
        images: Sequence[str | Path | Image],
        *,
        pooling: str = "tokens",
        normalize: bool = False,
        batch_size: int = 16,
        progress: bool = True,
        cache: EmbeddingCache | None = None,
    ) -> Encoded:
        """Embed images given as paths or PIL images.

        Args:
            pooling: "tokens": every vector of the last layer, a class token included where the model has one;
                "mean" over the same vectors; "cls", the first of them (refused for a convolutional model).
            normalize: divide each vector by max(its L2 norm, 1e-12).
            batch_size: images per forward.
            progress: show a bar on stderr, if that is a terminal.
            cache: read and store vectors, keyed by the hash of the decoded pixels, the model and the settings.

        Returns:
            Encoded on the CPU: `pooled [n, d]` float32, or `values [sum_len, d]` in the model's dtype with offsets.

        Raises:
            ValueError: an image that cannot be read, naming the argument's position and the file.
        """
        if pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {POOLINGS}, got {pooling!r}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be ≥ 1, got {batch_size}")
        if isinstance(images, (str, Path)):
            raise TypeError("images must be a sequence, got one path; write [path]")
        if cache is None:
            return self._run(images, range(len(images)), pooling, normalize, batch_size, progress)
        keys = [_pixel_hash(read_image(image, i)) for i, image in enumerate(images)]
        first = {key: i for i, key in reversed(list(enumerate(keys)))}
        return cache.get_or_compute(
            keys,
            lambda part: self._run(images, [first[key] for key in part], pooling, normalize, batch_size, progress),
            context={
                "model": self.name, "weights": self._hash(self.model), "dtype": str(self.model.dtype),
                "processor": self.processor.to_json_string(), "pooling": pooling, "normalize": str(bool(normalize)),
            },
        )  # fmt: skip

    def forward_tokens(self, pixel_values: Tensor) -> Tensor:
        """Last-layer vectors `[B, P, d]` of preprocessed pixels `[B, 3, H, W]`; feature maps are read row by row."""
        hidden = self.model(pixel_values=pixel_values).last_hidden_state
        return hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden

    def _run(
        self, images: Sequence[Any], chosen: Sequence[int], pooling: str, normalize: bool, batch_size: int,
        progress: bool,
    ) -> Encoded:  # fmt: skip
        dtype = self.model.dtype if pooling == "tokens" else torch.float32
        pieces = [torch.zeros(0, self.hidden_size, dtype=dtype)]
        lengths = [torch.zeros(1, dtype=torch.int64)]
        with progress_bar("images", len(chosen), progress) as advance, torch.no_grad():
            for start in range(0, len(chosen), batch_size):
                batch = [read_image(images[i], i) for i in chosen[start : start + batch_size]]
                pixels = self.processor(images=batch, return_tensors="pt")["pixel_values"]
                piece, count = self._pooled(pixels.to(self.device, self.model.dtype), pooling)
                if normalize:
                    piece = piece / piece.norm(dim=1, keepdim=True).clamp_min(1e-12)
                pieces.append(piece.cpu())
                lengths.append(torch.full((len(batch),), count))
                advance(len(batch))
        found = torch.cat(pieces)
        if pooling != "tokens":
            return Encoded(pooled=found)
        return Encoded(values=found, offsets=torch.cat(lengths).cumsum(0))

    def _pooled(self, pixels: Tensor, pooling: str) -> tuple[Tensor, int]:
        hidden = self.forward_tokens(pixels)
        if pooling == "tokens":
            return hidden.reshape(-1, hidden.shape[2]), hidden.shape[1]
        if pooling == "cls":
            if not any(name.endswith(("cls_token", "class_embedding")) for name, _ in self.model.named_parameters()):
                raise ValueError(f"pooling='cls': {type(self.model).__name__} has no class token; use 'mean'")
            return hidden[:, 0].float(), 1
        return hidden.float().mean(1), 1


def read_image(image: str | Path | Image, position: int) -> Image:
    """An RGB copy of a PIL image or of the file at a path; ValueError naming `images[position]` if it is unreadable."""
    pil = require("PIL.Image")
    if isinstance(image, pil.Image):
        return image.convert("RGB")
    if not isinstance(image, (str, Path)):
        raise TypeError(f"images[{position}] must be a path or a PIL image, got {type(image).__name__}")
    try:
        with pil.open(io.BytesIO(Path(image).read_bytes())) as opened:
            return opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, pil.DecompressionBombError) as error:
        raise ValueError(f"images[{position}]: cannot read {str(image)!r}: {first_line(error)}") from error


def _pixel_hash(image: Image) -> str:
    return hashlib.sha256(f"{image.size}|".encode() + image.tobytes()).hexdigest()


def _width(config: Any) -> int:
    if hasattr(config, "hidden_size"):
        return int(config.hidden_size)
    return int(config.hidden_sizes[-1])

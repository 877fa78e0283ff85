"""Data Adaptation Layer: catalogues from every common layout, and their text, images and tables as model input."""

from ._planted import Behaviour
from .catalogue import Catalogue, Features
from .errors import CatalogueError
from .generate import generate_catalogue
from .history import HistoryState, HistorySummary
from .image_text import Captioner, Describer, MeasuredDescriber, image_texts
from .images import ImagePatches, image_patches, load_image
from .interactions import Interactions
from .knowledge import triple_texts
from .schema import TableSchema
from .tables import MultiColumn, TableArrays, TableFit, encode_table
from .text import TextTemplate, item_texts, mask_title
from .text_cache import TextCache

__all__ = [
    "Behaviour",
    "Captioner",
    "Catalogue",
    "CatalogueError",
    "Describer",
    "Features",
    "HistoryState",
    "HistorySummary",
    "ImagePatches",
    "Interactions",
    "MeasuredDescriber",
    "MultiColumn",
    "TableArrays",
    "TableFit",
    "TableSchema",
    "TextCache",
    "TextTemplate",
    "encode_table",
    "generate_catalogue",
    "image_patches",
    "image_texts",
    "item_texts",
    "load_image",
    "mask_title",
    "triple_texts",
]

"""Data Adaptation Layer: catalogues from every common layout, and their text, images and tables as model input."""

from ._planted import Behaviour
from .catalogue import Catalogue, Features
from .errors import CatalogueError
from .generate import generate_catalogue
from .images import ImagePatches, image_patches, load_image
from .interactions import Interactions
from .schema import TableSchema
from .tables import MultiColumn, TableArrays, TableFit, encode_table
from .text import TextTemplate, item_texts, mask_title

__all__ = [
    "Behaviour",
    "Catalogue",
    "CatalogueError",
    "Features",
    "ImagePatches",
    "Interactions",
    "MultiColumn",
    "TableArrays",
    "TableFit",
    "TableSchema",
    "TextTemplate",
    "encode_table",
    "generate_catalogue",
    "image_patches",
    "item_texts",
    "load_image",
    "mask_title",
]

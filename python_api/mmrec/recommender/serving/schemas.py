"""What the server takes and gives, as JSON."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

__all__ = [
    "Error",
    "FoundItems",
    "Health",
    "ItemsIn",
    "ItemsOut",
    "RecommendIn",
    "RecommendOut",
    "RemoveIn",
    "RemoveOut",
]

MAX_ID, MAX_TITLE, MAX_HISTORY, MAX_K, MAX_ITEMS, MAX_TEXT, MAX_LIST = 512, 4096, 1000, 1000, 4096, 65536, 1000

ItemId = Annotated[str, Field(min_length=1, max_length=MAX_ID, description="id of an item")]
# JSON has one kind of number, and 3.0 is an integer there.
Whole = Annotated[int, BeforeValidator(lambda given: int(given) if _is_whole(given) else given)]
Value = (
    Annotated[str, Field(max_length=MAX_TEXT)] | int | float | list[Annotated[str, Field(max_length=MAX_TITLE)]] | None
)
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


def _is_whole(given: object) -> bool:
    return isinstance(given, float) and given.is_integer()


class _In(BaseModel):
    """Unknown names are errors: a misspelt option must not be taken for its default."""

    model_config = ConfigDict(extra="forbid", strict=True)


class RecommendIn(_In):
    """A history, and what is wanted after it."""

    history: list[ItemId] = Field(min_length=1, max_length=MAX_HISTORY, description="item ids, oldest first")
    k: Whole = Field(10, ge=1, le=MAX_K, description="items per answer")
    exclude_seen: bool = Field(True, description="leave the history's own items out")
    exclude: list[ItemId] = Field([], max_length=MAX_LIST, description="other items to leave out")
    candidates: list[ItemId] | None = Field(
        None, max_length=MAX_LIST, description="the only items that may be answered; those that are not there are none"
    )
    depth: Whole | None = Field(None, ge=1, description="how many last items are read")
    rerank: Whole = Field(0, ge=0, le=MAX_K, description="how many of the best items are ranked again")
    budget_ms: float | None = Field(
        None, gt=0, le=60_000, allow_inf_nan=False,
        description="milliseconds from arrival to answer; depth and rerank are then chosen",
    )  # fmt: skip
    quantile: float = Field(0.99, gt=0, le=0.99, description="share of answers that keep the budget")


class ItemOut(BaseModel):
    """One recommended item."""

    id: str
    title: str
    score: float
    rerank_score: float | None = Field(None, description="by the reranker, where that ranked it")
    mass: dict[str, float] = Field(description="share of attention that each modality had in its vector")
    known: bool = Field(description="training interacted with it")


class HowOut(BaseModel):
    """What was done, and how long that took."""

    depth: int
    rerank: int
    batch: int = Field(description="requests that were answered together")
    waited_ms: float
    took_ms: float = Field(description="of the call, without waiting for it")
    budget_ms: float | None
    expected_ms: float | None
    in_time: bool


class RecommendOut(BaseModel):
    """The best items, best first."""

    items: list[ItemOut]
    unknown: list[str] = Field(description="ids of the history that the store does not have; they were left out")
    version: int = Field(description="of the store")
    how: HowOut


class ItemIn(_In):
    """An item to put in: all of it for a new one; of one that is there, what is not given stays."""

    id: ItemId
    content: dict[str, Value] | None = Field(
        None, max_length=256, description="by column of the catalogue: all of it, of which the model makes the vector"
    )
    vector: list[Annotated[float, Field(allow_inf_nan=False)]] | None = Field(None, max_length=1 << 16)
    mass: dict[str, Share] | None = Field(None, description="share of attention of each modality")
    known: bool | None = Field(None, description="training interacted with it")
    title: str | None = Field(None, max_length=MAX_TITLE)


class ItemsIn(_In):
    """Items to put in, all or none of them."""

    items: list[ItemIn] = Field(min_length=1, max_length=MAX_ITEMS)


class ItemsOut(BaseModel):
    """What came of it."""

    version: int = Field(description="of the store, which is served from now on")
    items: int = Field(description="of the store")
    new: int


class RemoveIn(_In):
    """Items to remove."""

    ids: list[ItemId] = Field(min_length=1, max_length=MAX_ITEMS)


class RemoveOut(BaseModel):
    """What came of it."""

    version: int = Field(description="of the store, which is served from now on")
    items: int = Field(description="of the store")
    removed: int
    unknown: list[str] = Field(description="ids that the store did not have")


class FoundItem(BaseModel):
    """An item of the store."""

    id: str
    title: str


class FoundItems(BaseModel):
    """Items whose title or id holds a text."""

    items: list[FoundItem]


class Health(BaseModel):
    """That the server can answer, and from what."""

    status: str
    version: int
    items: int
    model: str
    dtype: str
    modalities: list[str]
    max_length: int
    reranker: str
    ann: str = Field(description="kind of approximate retrieval, empty for none")
    recall: float = Field(description="share of the 100 best items that retrieval finds, as measured at the start")
    budgets: bool = Field(description="costs are known, so that budget_ms can be kept")
    waiting: int


class Error(BaseModel):
    """Why not."""

    detail: str

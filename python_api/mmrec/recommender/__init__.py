"""The recommender: item tower, user tower, objective, and the order in which training reads the data."""

from .batches import Batch, epoch_batches, num_batches
from .config import IDENTITY, RecommenderConfig
from .inputs import ItemInputs, ItemSpec, TableSpec, TokenSpec
from .item_tower import ItemOutput, ItemTower
from .judging import LLMJudge
from .latency import calibrate
from .model import Answers, ItemVectors, Recommender
from .objective import Losses, Objective
from .online import Answer, OnlineRecommender, Reranker
from .planning import Costs, How, Plan
from .prompted import Examples, PromptedConfig, PromptedRecommender
from .rerank import LLMReranker
from .store import ItemStore
from .user_tower import UserTower

__all__ = [
    "IDENTITY",
    "Answer",
    "Answers",
    "Batch",
    "Examples",
    "Reranker",
    "LLMJudge",
    "LLMReranker",
    "Plan",
    "PromptedConfig",
    "PromptedRecommender",
    "How",
    "Costs",
    "ItemInputs",
    "ItemOutput",
    "ItemSpec",
    "ItemStore",
    "ItemTower",
    "ItemVectors",
    "Losses",
    "Objective",
    "OnlineRecommender",
    "Recommender",
    "RecommenderConfig",
    "TableSpec",
    "TokenSpec",
    "UserTower",
    "calibrate",
    "epoch_batches",
    "num_batches",
]

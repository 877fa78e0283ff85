"""``mmrec experiment NAME``: questions of the survey as commands that answer on the data at hand."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

__all__ = ["EXPERIMENTS", "Experiment"]


@dataclass(frozen=True)
class Experiment:
    """Where an experiment is.

    Attributes:
        question: what it asks, for the list.
        module, run: ``run(context)`` in ``module`` gives the data and the findings.
        settings: class of its settings in ``module``.
        seeds: of trainings, unless others are asked for.
    """

    question: str
    module: str
    run: str
    settings: str
    seeds: tuple[int, ...] = (0, 1, 2)

    def load(self) -> tuple[Any, Any]:
        """The function and the class of the settings; nothing is imported before."""
        module = import_module(f".{self.module}", __name__)
        return getattr(module, self.run), getattr(module, self.settings)


EXPERIMENTS: dict[str, Experiment] = {
    "prompting": Experiment(
        "What does a frozen language model know of what comes next, and how should it be asked?", "prompting",
        "prompting_run", "PromptingSettings", (0,),
    ),
    "soft-prompt-lora": Experiment(
        "Do soft prompts and LoRA on the last layers add up?", "prompted", "soft_prompt_lora_run",
        "SoftPromptLoraSettings",
    ),
    "alignment-ablation": Experiment(
        "What does aligning modalities do for cold items, and what does it cost warm ones?", "alignment",
        "alignment_run", "AlignmentSettings",
    ),
    "modality-ablation": Experiment(
        "Which modality does the model listen to?", "modality", "modality_run", "ModalitySettings"
    ),
    "missing-modality": Experiment(
        "How does the model bear missing content, and does filling it in help?", "modality", "missing_run",
        "MissingSettings",
    ),
    "gap": Experiment(
        "How far apart are hard prompts, soft prompts and LoRA, by examples?", "prompted", "gap_run", "GapSettings",
        (0, 1),
    ),
    "evaluator": Experiment(
        "How far can a language model be trusted as a judge?", "evaluator", "evaluator_run", "EvaluatorSettings", (0,)
    ),
    "latency": Experiment("What does quality cost in milliseconds?", "latency", "latency_run", "LatencySettings", (0,)),
    "prompt-adapter": Experiment(
        "Which of prompt, rank, placement and order of tuning matter, and do they interfere?", "prompted",
        "factorial_run", "FactorialSettings", (0, 1),
    ),
}  # fmt: skip

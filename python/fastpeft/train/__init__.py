"""Recipe -> data -> Trainer -> report: fine-tuning as one call. Prints nothing; `fastpeft.cli` does.

    from fastpeft.train import Recipe, train
    summary = train(Recipe(model="smollm2", data=["kjv:*,-Ruth"], heldout=["kjv:Ruth"]), "runs/ruth")

transformers, accelerate and matplotlib are imported only when a run starts.
"""

from .recipe import Recipe, load_recipe, resolve
from .reporter import Reporter
from .run import evaluate_run, train

__all__ = ["Recipe", "Reporter", "evaluate_run", "load_recipe", "resolve", "train"]

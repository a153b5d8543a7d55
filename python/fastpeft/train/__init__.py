"""Recipe -> data -> Trainer -> report: fine-tuning as one call. Prints nothing; the cli does.

    from fastpeft.train import resolve, train
    summary = train(resolve({"model": "smollm2", "data": ["poems.txt"], "steps": 40}), "runs/poems")

transformers, accelerate and matplotlib are imported only when a run starts.
"""

from .recipe import Recipe, load_recipe, resolve
from .reporter import Reporter
from .run import evaluate_run, train

__all__ = ["Recipe", "Reporter", "evaluate_run", "load_recipe", "resolve", "train"]

"""Models that learn what another one writes. For lab/teacher.py."""
from outer_loop import score
from support.config import PRESETS, Config
from support.run import Run


def students(small, seed: int, split: str, folder) -> dict:
    """{"small" or "large": (a run of the tiny preset by this model, the model)}.

    small: a checkpoint of the small one. split: of held-out towns. folder: for the runs."""
    found = {}
    for size, model in (("small", small), ("large", PRESETS["tiny"]["model"])):
        own = {"model": model, "seed": seed, "eval_data": split, "run_dir": f"{folder}/{size}"}
        run = Run(Config(**PRESETS["tiny"] | own))
        found[size] = run, run.read_model(model)
    return found


def worth(learners: dict, who: str, tasks, edits, t: int, split: str) -> list[list[float]]:
    """The reward of every self-edit of round t, learned by one of these with its own tokenizer."""
    run, model = learners[who]
    without = [0.0] * len(tasks)
    return score(run, model, tasks, edits, t, split, without, run.cfg.seeds, arm=who)

"""The gain of upcycling: a dense model trained further, the same model made into experts, and experts from scratch, for equal steps.

`python -m benchmarks.upcycling [--steps 300] [--seeds 1] [--out FILE.json]`. The dense model of the preset tiny-dense is trained for
`steps` steps; then, each with a new schedule of as many steps: the dense model continues; its upcycled copies (8 experts, top 2) continue;
a routed model starts from scratch. Last, a routed model starts from scratch and has all the steps of the upcycled one.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from benchmarks.machine import machine
from minimoe.config import Config, load_config
from minimoe.config.cost import cost
from minimoe.runs.run import Run
from minimoe.study.convert import upcycled_state
from minimoe.training.trained_run import TrainedRun
from minimoe.training.trainer import Trainer


def configuration(preset: str, seed: int, steps: int, overrides: tuple[str, ...] = ()) -> Config:
    keys = (f"train.steps={steps}", f"train.seed={seed}", "train.eval_every=0", "train.checkpoint_every=0", *overrides)
    return load_config(preset, keys)


def train(config: Config, root: Path, state: dict[str, Any] | None = None) -> TrainedRun:
    trainer = Trainer(config)
    if state is not None:
        trainer.model.load_state_dict(state)
    return trainer.run(Run.create(trainer.config, None, root))


def ladder(seed: int, steps: int, root: Path) -> dict[str, float]:
    """Validation loss of each way, in nats per token."""
    dense_config = configuration("tiny-dense", seed, steps)
    hidden = f"moe.d_hidden={dense_config.model.d_hidden}"
    routed_config = configuration("tiny-dense", seed, steps, ("moe.n_experts=8", "moe.top_k=2", hidden))
    dense = train(dense_config, root)
    upcycled = Trainer(routed_config)
    upcycled.model.load_state_dict(upcycled_state(dense.model, upcycled.model))
    state = {name: dense.model.backend.to_host(array).copy() for name, array in dense.model.state_dict().items()}
    found = {"dense": dense.val_loss, "dense, on": train(dense_config, root, state).val_loss}
    found["upcycled, on"] = upcycled.run(Run.create(upcycled.config, None, root)).val_loss
    found["routed, new"] = train(routed_config, root).val_loss
    longer = replace(routed_config, train=replace(routed_config.train, steps=2 * steps))
    found["routed, new, all steps"] = train(longer, root).val_loss
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        runs = [ladder(seed, options.steps, Path(root)) for seed in range(options.seeds)]
    model = configuration("tiny-dense", 0, 1).model
    print(f"{cost(replace(model, vocab_size=256)).total:,} parameters dense; python-docs, {options.steps} steps and as many more")
    for name in runs[0]:
        losses = [run[name] for run in runs]
        print(f"{name:24} {statistics.mean(losses):.4f}   {' '.join(f'{loss:.4f}' for loss in losses)}")
    if options.out:
        options.out.write_text(json.dumps({"machine": machine(), "steps": options.steps, "runs": runs}, indent=2) + "\n")


if __name__ == "__main__":
    main()

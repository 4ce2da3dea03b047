"""Trains a network on a labelled COCO folder and evaluates it: `python train_and_evaluate.py parts_coco run`.

`parts_coco` holds `train/` and `val/`, each with images and a COCO annotation file.
"""

import sys
from collections.abc import Mapping
from typing import Any

import flawmask
from flawmask.training.callbacks import Callback
from flawmask.training.run import Run


class Printed(Callback):
    """Prints the loss of each epoch; see `Callback` for the other moments of a training."""

    def on_epoch_end(self, run: Run, figures: Mapping[str, Any]) -> None:
        """Print it."""
        print(f"epoch {figures['epoch']}: loss {figures['train_loss']:.3f}")


def main(dataset_dir: str, output_dir: str, **settings: Any) -> None:
    """Train with these settings, evaluate on the validation split and print the figures with their intervals."""
    trained = flawmask.train(dataset_dir=dataset_dir, output_dir=output_dir, callbacks=[Printed()], **settings)
    evaluated = flawmask.evaluate(model=trained.run_dir / "best.pt", dataset_dir=dataset_dir)
    for name, (low, high) in evaluated.metrics["intervals"].items():
        print(f"{name}: {evaluated.metrics[name]:.3f}, 95 % interval {low:.3f} to {high:.3f}")
    print(f"look at {evaluated.results_dir / 'report.html'}")


if __name__ == "__main__":
    main(*sys.argv[1:3], weights="none", epochs=20)

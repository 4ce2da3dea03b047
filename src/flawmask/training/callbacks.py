"""What is told of a training at a few named moments: pictures and trackers, and whatever a user's program wants."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flawmask.training import loader
from flawmask.training.curves import draw_curves
from flawmask.training.label_plots import draw_labels
from flawmask.training.pictures import draw_predictions, draw_train_batch
from flawmask.training.trackers import Record

if TYPE_CHECKING:
    from flawmask.training.run import Run


class Callback:
    """Something that is told of a training, in the main process; by default it does nothing.

    `run.setup` says what the training is made of; `run.setup.run_dir` is its folder. `run.history` says what each epoch
    came to, as `history.json` does. What a callback raises ends the training.
    """

    def on_begin(self, run: "Run") -> None:
        """Be told that there is a run folder. One that goes on has had its folder before, and nothing is told."""

    def on_write(self, run: "Run") -> None:
        """Be told that the epoch's checkpoints are written, and `history.json` is not yet. Where a training is killed
        in between, this is told once more when it goes on. So whoever writes a file does so here."""

    def on_epoch_end(self, run: "Run", figures: Mapping[str, Any]) -> None:
        """Be told what an epoch came to, once.

        Args:
            run: the training.
            figures: by name, as `history.json` has them.
        """

    def on_end(self, run: "Run") -> None:
        """Be told that the training has had all its epochs."""


class Pictures(Callback):
    """Draws `labels.png` and `train_batch.jpg` into the run folder, and `curves.png` after each epoch."""

    def on_begin(self, run: "Run") -> None:
        """Draw what is learned from."""
        setup = run.setup
        draw_labels(setup.training, setup.spec, setup.run_dir / "labels.png")
        # The order of an epoch is its seed's: these are the batches that the first one began with.
        items = loader.SplitDataset(setup.training, setup.spec, augmenting=setup.augmenting)
        marks_epochs = setup.augmenting is not None
        order = loader.Order(items.shapes, setup.batch_size, seed=setup.config.seed, marks_epochs=marks_epochs)
        shown = loader.read(loader.make_loader(items, order, workers=0, pin=False))
        draw_train_batch(run.step.model, run.step.detector, shown, setup.training, setup.run_dir / "train_batch.jpg")

    def on_write(self, run: "Run") -> None:
        """Draw the course so far."""
        draw_curves(run.history, run.best_epoch, run.setup.config.select_by, run.setup.run_dir / "curves.png")


class Tracking(Callback):
    """Tells a tracker the figures of each epoch, and what is found on some validation images by then."""

    def __init__(self, record: Record) -> None:
        """Take what `track_run` gives."""
        self.record = record

    def on_epoch_end(self, run: "Run", figures: Mapping[str, Any]) -> None:
        """Tell it."""
        validation = run.setup.validation
        self.record(figures, draw_predictions(run.evaluation_backend(), validation) if validation else {})

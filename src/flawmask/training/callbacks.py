"""Callbacks: they are called at named moments of a training. Users may add more than `Pictures` and `Tracking`."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flawmask.training import loader
from flawmask.training.curves import draw_curves
from flawmask.training.label_plots import draw_labels
from flawmask.training.pictures import draw_predictions, draw_train_batch
from flawmask.training.tile_data import dataset_of
from flawmask.training.trackers import Record

if TYPE_CHECKING:
    from flawmask.training.run import Run


class Callback:
    """The base class of callbacks. Its methods do nothing; override those that you need.

    They are called in the main process only. `run.setup` holds the settings and the data of the training;
    `run.setup.run_dir` is its folder. `run.history` holds the metrics of each epoch, as `history.json` does. An
    exception in a callback ends the training.
    """

    def on_begin(self, run: "Run") -> None:
        """Called once, when the run folder has been made. It is not called again when a training is resumed."""

    def on_write(self, run: "Run") -> None:
        """Called after each epoch, when its checkpoints are written and `history.json` is not yet. Write files here.

        If the training is killed before `history.json` is written, this is called once more when it is resumed.
        """

    def on_epoch_end(self, run: "Run", figures: Mapping[str, Any]) -> None:
        """Called exactly once after each epoch.

        Args:
            run: the training.
            figures: the metrics of the epoch by name, as in `history.json`.
        """

    def on_end(self, run: "Run") -> None:
        """Called after the last epoch."""


class Pictures(Callback):
    """Draws `labels.png` and `train_batch.jpg` into the run folder, and `curves.png` after each epoch."""

    def on_begin(self, run: "Run") -> None:
        """Draw the training data."""
        setup = run.setup
        draw_labels(setup.training, setup.spec, setup.run_dir / "labels.png")
        # The seed decides the order of an epoch, so these are the first batches of the first epoch.
        seed = setup.config.seed
        items = dataset_of(setup.training, setup.spec, seed, augmenting=setup.augmenting)
        order = loader.Order(
            items.shapes,
            setup.batch_size,
            seed=seed,
            marks_epochs=items.changes,
            lies_on_its_side=items.lies_on_its_side,
        )
        batches = loader.read(loader.make_loader(items, order, workers=0, pin=False))
        draw_train_batch(run.step.model, run.step.detector, batches, setup.training, setup.run_dir / "train_batch.jpg")

    def on_write(self, run: "Run") -> None:
        """Draw the metrics of all epochs so far."""
        draw_curves(run.history, run.best_epoch, run.setup.config.select_by, run.setup.run_dir / "curves.png")


class Tracking(Callback):
    """Sends the metrics of each epoch to a tracker, with predictions on a few validation images."""

    def __init__(self, record: Record) -> None:
        """Take the function that `track_run` yields."""
        self.record = record

    def on_epoch_end(self, run: "Run", figures: Mapping[str, Any]) -> None:
        """Send the metrics and the predictions."""
        validation = run.setup.validation
        self.record(figures, draw_predictions(run.evaluation_backend(), validation) if validation else {})

"""Tasks for tests with several processes. A launcher starts `python process_tasks.py TASK FOLDER` in each process."""

import sys
from pathlib import Path
from typing import Any

import torch
from small_network import put_in_place
from stained_plates import settings
from undrawn import STUBS, patched

from flawmask.coco import read_split
from flawmask.distributed import Processes, processes
from flawmask.model.build import build
from flawmask.model.spec import ModelSpec
from flawmask.training import loader, loop, step
from flawmask.training.epoch import one_epoch

SPEC = ModelSpec("maskrcnn_resnet18_fpn", ("good", "defect"), image_size=64, norm="group", proposals=20)


def speak(team: Processes, folder: Path) -> None:
    """Use every kind of communication between processes, and write the results."""
    tensors = [torch.tensor([1.0, 2.0]) * 10**team.rank, torch.full((2, 2), float(team.rank)).t()]
    team.all_reduce_sum(tensors)
    team.all_reduce_sum([])
    made: list[int] = []

    def make() -> str:
        made.append(team.rank)
        return f"made by {team.rank}"

    broadcast = team.from_main(make)
    items = list("abcde")
    torch.save(
        {
            "sums": tensors,
            "broadcast": broadcast,
            "made": made,
            "shard": team.shard(items),
            "gathered": team.gather(team.shard(items)),
            "few": team.gather(team.shard(["alone"])),
            "none": team.gather(team.shard([])),
        },
        folder / f"{team.rank}.pt",
    )


def take_steps(team: Processes, folder: Path) -> None:
    """Take two steps on the four images in micro-batches of one image, and write figures and weights."""
    torch.manual_seed(0)
    model = build(SPEC).train()
    config = settings(folder / "data", optimizer="sgd", scheduler="constant", warmup_steps=0)
    device = torch.device("cpu")
    taken = step.make_step(config, model, SPEC, device, torch.float32, "detector", micro_batch_size=1, team=team)
    items = loader.SplitDataset(read_split(folder / "data", "train"), SPEC)
    order = loader.Order([(8, 8)] * 4, 4, seed=1, rank=team.rank, processes=team.count)
    figures = []
    for order.epoch in (1, 2):
        for batch in loader.read(loader.make_loader(items, order, workers=0, pin=False)):
            assert len(batch) == 4 // team.count
            torch.manual_seed(order.epoch)  # the step's, in every process
            figures.append(taken(batch, 0.0).values)
    torch.save({"figures": figures, "weights": model.state_dict()}, folder / f"steps_{team.rank}_of_{team.count}.pt")


def train(_: Processes, folder: Path) -> None:
    """Train with all features on which processes have to agree. Write the weights of each process after each epoch."""

    def epoch(run: Any, *inputs: Any, **more: Any) -> dict[str, Any]:
        figures = one_epoch(run, *inputs, **more)
        team = run.setup.team
        metrics = {
            name: value
            for name, value in figures.items()
            if name not in ("elapsed", "seconds", "images_per_second", "waiting")
        }
        content = {"model": run.step.model.state_dict(), "kept": run.evaluated_model.state_dict(), "figures": metrics}
        torch.save(content, folder / f"epoch_{run.epoch}_{team.rank}.pt")
        return figures

    replaced: Any = loop
    replaced.one_epoch = epoch
    # There is one validation image, so one process has none. Only the main process logs.
    changes: dict[str, Any] = {"norm": "batch", "ema": True, "select_by": "f1", "log": "tensorboard"}
    with patched(STUBS):
        loop.train(settings(folder / "data", epochs=2, **changes))


def main() -> None:
    torch.set_num_threads(1)
    put_in_place()
    task, folder = {"speak": speak, "take_steps": take_steps, "train": train}[sys.argv[1]], Path(sys.argv[2])
    if task is train:  # which makes its own
        train(Processes(), folder)
        return
    with processes(torch.device("cpu")) as team:
        task(team, folder)


if __name__ == "__main__":
    main()

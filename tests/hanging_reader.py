"""`python hanging_reader.py done|error|interrupted START_METHOD` ends so while its data loader processes hang."""

import multiprocessing
import sys
import time
from typing import Any

from torch.utils.data import Dataset

from flawmask.training.loader import make_loader, read


class Hanging(Dataset[int]):
    """Two readable images, and others on a dead mount."""

    def __getitem__(self, place: int) -> int:
        if place > 1:
            time.sleep(10**6)
        return place


if __name__ == "__main__":
    how, start_method = sys.argv[1:]
    multiprocessing.set_start_method(start_method)
    order: Any = [[place] for place in range(8)]
    batches = make_loader(Hanging(), order, workers=2, pin=False, collate=list)
    for place, _ in enumerate(read(batches)):
        if place == 1:
            if how == "done":
                break
            raise {"error": ValueError, "interrupted": KeyboardInterrupt}[how]

"""Where and how precisely the network computes, and what is drawn at random: asked once, passed on."""

import ctypes
import random
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from packaging.version import Version

from flawmask.errors import FlawmaskError
from flawmask.launch import is_own_process, local_rank
from flawmask.settings import Precision

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Of glibc's malloc.h: above how much free memory the heap shrinks, and how many blocks may live outside it."""

OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")
"""What PyTorch says when there is none left, on CUDA, Windows and Linux."""


def choose_device(name: str | None) -> torch.device:
    """Return the device named, or the first of CUDA, MPS and CPU that is there.

    Of several processes on a machine, each has a GPU of its own.

    Args:
        name: `cuda`, `cuda:1`, `mps`, `cpu`, or None to choose.

    Raises:
        FlawmaskError: there is no such device; the message says which there are.
    """
    there = [f"cuda:{number}" for number in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    there += ["mps"] if torch.backends.mps.is_available() else []
    there += ["cpu"]
    own = f"cuda:{local_rank()}"
    first = own if there[0].startswith("cuda") else there[0]
    wanted = first if name is None else own if name == "cuda" else name
    if wanted not in there:
        raise FlawmaskError(f"--device {name} is not there: this machine has {', '.join(there)}")
    return torch.device(wanted)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which the device, if it is one of CUDA's, is the current one: that of new streams and events,
    of page-locked memory, and of what is asked without naming a device. Afterwards the host's is current again."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def refuse_wrong_gradients(device: torch.device) -> None:
    """Refuse to train where gradients are known to be wrong.

    Raises:
        FlawmaskError: the device is MPS and torchvision is older than 0.29, whose RoIAlign adds gradients up too
            often there (https://github.com/pytorch/vision/pull/9510).
    """
    if device.type == "mps" and Version(torchvision.__version__).release < (0, 29):
        raise FlawmaskError(
            f"torchvision {torchvision.__version__} computes wrong RoIAlign gradients on MPS: "
            "install 0.29 or newer, or train with --device cpu"
        )


def keep_freed_memory(device: torch.device) -> None:
    """Let this process keep the memory that a network's layers free, for the layers that come next.

    A CPU's memory comes from the C library, and glibc's gives large blocks back to the system at once: then the system
    has to clear each page of the next layer's output again, which took an eighth of the time of a training step and of
    an inference (docs/benchmarks.md). Other C libraries, and other devices, are left as they are, and so is a process
    that is not Flawmask's own.
    """
    if device.type != "cpu" or not is_own_process():
        return
    with suppress(AttributeError, OSError, TypeError):  # glibc alone has it
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def memory_of_process(kind: str) -> int | None:
    """Return the bytes of memory that this process has: `VmRSS` now, `VmHWM` at most. None where Linux is not there."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{kind}:")), None)


def peak_memory(device: torch.device) -> int | None:
    """Return the most bytes that this process has had: of the GPU's memory, or else of the machine's. None where the
    system does not say (it does on Linux and macOS)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if (most := memory_of_process("VmHWM")) is not None:
        return most  # what getrusage says on Linux includes the process that started this one
    with suppress(ImportError):  # Windows
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return None


def choose_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """Return the type that autocast computes in; float32 means no autocast.

    `auto` is bfloat16 where the hardware multiplies it (CUDA from Ampere on; CPUs with AMX or AVX-512 BF16), and
    float32 elsewhere.

    Raises:
        FlawmaskError: fp16 is asked for without CUDA: its gradients need a scaler that is only tried there.
    """
    if precision == "auto":
        return torch.bfloat16 if _has_bf16(device) else torch.float32
    if precision == "fp16" and device.type != "cuda":
        raise FlawmaskError(f"--precision fp16 needs CUDA, and the device is {device}: use bf16, fp32 or auto")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        with on_device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


class _Float32:
    """How many are inside `ieee_float32`, and the settings that the first of them found."""

    lock = threading.Lock()
    inside = 0
    found: tuple[tuple[Any, str, Any], ...] = ()


@contextmanager
def ieee_float32() -> Iterator[None]:
    """Within, float32 is IEEE's on NVIDIA's GPUs too, for the whole process. Afterwards the settings have the values
    that they had. PyTorch cannot unset one: a global `torch.backends.fp32_precision` that is changed later does not
    reach them any more.

    By default PyTorch lets cuDNN's convolutions drop 13 of the 23 bits of a float32's fraction (TF32), which moves a
    score by some 1e-3. Several threads may be inside at once: the first one switches, the last one puts back.
    """
    with _Float32.lock:
        if _Float32.inside == 0:
            _Float32.found = _without_tf32()
        _Float32.inside += 1
    try:
        yield
    finally:
        with _Float32.lock:
            _Float32.inside -= 1
            if _Float32.inside == 0:
                for owner, name, value in _Float32.found:
                    setattr(owner, name, value)


def _without_tf32() -> tuple[tuple[Any, str, Any], ...]:
    """Switch TF32 off and return the settings that there were: owner, name and value, in the order to put them back."""
    cudnn: Any = torch.backends.cudnn
    matmul = torch.backends.cuda.matmul
    wanted: list[tuple[Any, str, Any]] = [(one, "fp32_precision", "ieee") for one in (cudnn.conv, cudnn.rnn, matmul)]
    found = tuple((owner, name, getattr(owner, name)) for owner, name, _ in wanted)
    # PyTorch refuses to say what the older setting is where it and the newer ones differ, so it is switched with them;
    # and where the program around this one has let them differ already, it is left alone.
    with suppress(RuntimeError):
        found = ((cudnn, "allow_tf32", cudnn.allow_tf32), *found)
        wanted.insert(0, (cudnn, "allow_tf32", False))
    if matmul.fp32_precision != "tf32":
        found, wanted = found[:-1], wanted[:-1]
    for owner, name, value in wanted:
        setattr(owner, name, value)
    return found


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - for libraries that draw from the global generator
    torch.manual_seed(seed)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether Python, NumPy or PyTorch says that there is no memory left."""
    is_named = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return is_named or any(text in str(error) for text in OUT_OF_MEMORY)

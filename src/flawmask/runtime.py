"""The device, the precision, the memory and the seeds that a network computes with."""

import ctypes
import platform
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
"""Parameters of `mallopt` in glibc's malloc.h: the free memory above which the heap shrinks, and the largest number of
blocks outside the heap."""

OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")
"""What PyTorch's messages say when memory ran out: on CUDA, Windows and Linux."""


def choose_device(name: str | None) -> torch.device:
    """Return the named device, or the first available one of CUDA, MPS and CPU.

    Where several processes run on a machine, each gets its own GPU.

    Args:
        name: `cuda`, `cuda:1`, `mps`, `cpu`, or None to choose.

    Raises:
        FlawmaskError: there is no such device; the message lists the available ones.
    """
    available = [f"cuda:{number}" for number in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    available += ["mps"] if torch.backends.mps.is_available() else []
    available += ["cpu"]
    own_gpu = f"cuda:{local_rank()}"
    first = own_gpu if available[0].startswith("cuda") else available[0]
    wanted = first if name is None else own_gpu if name == "cuda" else name
    if wanted not in available:
        raise FlawmaskError(f"--device {name} is not there: this machine has {', '.join(available)}")
    return torch.device(wanted)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which a CUDA device is the current one. For other devices the context does nothing.

    New streams, events and page-locked memory belong to the current device, and so does every call that names none.
    Afterwards the previous device is current again.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def refuse_wrong_gradients(device: torch.device) -> None:
    """Refuse to train where gradients are known to be wrong.

    Before torchvision 0.29, RoIAlign on MPS adds some gradients more than once
    (https://github.com/pytorch/vision/pull/9510).

    Raises:
        FlawmaskError: the device is MPS and torchvision is older than 0.29.
    """
    if device.type == "mps" and Version(torchvision.__version__).release < (0, 29):
        raise FlawmaskError(
            f"torchvision {torchvision.__version__} computes wrong RoIAlign gradients on MPS: "
            "install 0.29 or newer, or train with --device cpu"
        )


def keep_freed_memory(device: torch.device) -> None:
    """Let this process keep the memory that a network's layers free, and reuse it for the next layers.

    On a CPU, tensors get their memory from the C library. glibc returns large freed blocks to the system at once, and
    the system then has to clear each page again for the next layer's output. That took an eighth of the time of a
    training step and of inference (docs/benchmarks.md). Nothing is changed for other C libraries, for other devices,
    and in a process that is not Flawmask's own.
    """
    if device.type != "cpu" or not is_own_process():
        return
    with suppress(AttributeError, OSError, TypeError):  # only glibc has it
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def memory_of_process(kind: str) -> int | None:
    """Return the bytes of memory that this process uses (`VmRSS`) or used at most (`VmHWM`). None outside Linux."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{kind}:")), None)


def peak_memory(device: torch.device) -> int | None:
    """Return the most bytes that this process has used: of the GPU's memory, or else of the machine's.

    None where the system does not tell; Linux and macOS do.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if (peak := memory_of_process("VmHWM")) is not None:
        return peak  # on Linux, getrusage would include the process that started this one
    with suppress(ImportError):  # Windows
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return None


def choose_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """Return the dtype that autocast computes in; float32 means no autocast.

    `auto` is bfloat16 where the hardware multiplies it faster than float32: CUDA from Ampere on, CPUs with AMX, and
    AMD's with AVX-512 BF16. Elsewhere it is float32. Intel's AVX-512 BF16 has half the rate of float32.

    Raises:
        FlawmaskError: fp16 is wanted without CUDA. Its gradients need a scaler, which is tested on CUDA only.
    """
    if precision == "auto":
        return torch.bfloat16 if _has_fast_bf16(device) else torch.float32
    if precision == "fp16" and device.type != "cuda":
        raise FlawmaskError(f"--precision fp16 needs CUDA, and the device is {device}: use bf16, fp32 or auto")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def _has_fast_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        with on_device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        has_avx512 = torch.cpu._is_avx512_bf16_supported() and not _is_intel()
        return bool(torch.cpu._is_amx_tile_supported() or has_avx512)
    return False


def _is_intel() -> bool:
    """Return whether the CPU is one of Intel's."""
    with suppress(OSError):  # Linux
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    return "GenuineIntel" in platform.processor()  # Windows


class _Float32:
    """How many threads are inside `ieee_float32`, and the settings from before the first of them entered."""

    lock = threading.Lock()
    inside = 0
    previous: tuple[tuple[Any, str, Any], ...] = ()


@contextmanager
def ieee_float32() -> Iterator[None]:
    """Compute float32 exactly as IEEE 754 says inside this context, for the whole process, on NVIDIA's GPUs too.

    By default, PyTorch lets cuDNN's convolutions drop 13 of the 23 bits of a float32's fraction (TF32), which moves a
    score by about 1e-3. Several threads may be inside at once: the first one switches TF32 off, the last one restores
    the settings. PyTorch cannot unset a restored setting, so a later change of the global
    `torch.backends.fp32_precision` no longer reaches it.
    """
    with _Float32.lock:
        if _Float32.inside == 0:
            _Float32.previous = _switch_tf32_off()
        _Float32.inside += 1
    try:
        yield
    finally:
        with _Float32.lock:
            _Float32.inside -= 1
            if _Float32.inside == 0:
                for owner, name, value in _Float32.previous:
                    setattr(owner, name, value)


def _switch_tf32_off() -> tuple[tuple[Any, str, Any], ...]:
    """Switch TF32 off and return the previous settings: owner, name and value, in the order to restore them."""
    cudnn: Any = torch.backends.cudnn
    matmul = torch.backends.cuda.matmul
    wanted: list[tuple[Any, str, Any]] = [(one, "fp32_precision", "ieee") for one in (cudnn.conv, cudnn.rnn, matmul)]
    previous = tuple((owner, name, getattr(owner, name)) for owner, name, _ in wanted)
    # Reading the older setting `allow_tf32` raises if it differs from the newer ones. So it is switched together with
    # them. If the calling program lets them differ already, the older one is left alone.
    with suppress(RuntimeError):
        previous = ((cudnn, "allow_tf32", cudnn.allow_tf32), *previous)
        wanted.insert(0, (cudnn, "allow_tf32", False))
    if matmul.fp32_precision != "tf32":
        previous, wanted = previous[:-1], wanted[:-1]
    for owner, name, value in wanted:
        setattr(owner, name, value)
    return previous


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - for libraries that draw from the global generator
    torch.manual_seed(seed)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of Python, NumPy or PyTorch means that memory ran out."""
    is_named = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return is_named or any(text in str(error) for text in OUT_OF_MEMORY)

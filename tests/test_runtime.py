"""Which device and precision are chosen, and which choices are refused."""

import platform
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision

from flawmask import runtime
from flawmask.distributed import Processes, processes
from flawmask.errors import FlawmaskError
from flawmask.inference import torch_backend
from flawmask.inference.backend import Resized
from flawmask.inference.predictor import Predictor
from flawmask.model import checkpoint
from flawmask.model.spec import ModelSpec
from flawmask.runtime import (
    choose_device,
    choose_precision,
    ieee_float32,
    is_out_of_memory,
    on_device,
    refuse_wrong_gradients,
    seed_everything,
)
from flawmask.settings import Precision

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda:0"), torch.device("mps")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Simulate a machine that has only a CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    return monkeypatch


def add_cuda(machine: pytest.MonkeyPatch, count: int) -> None:
    machine.setattr(torch.cuda, "is_available", lambda: True)
    machine.setattr(torch.cuda, "device_count", lambda: count)


def add_mps(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(torch.backends.mps, "is_available", lambda: True)


def test_the_cpu_is_chosen_without_other_devices(machine: pytest.MonkeyPatch) -> None:
    assert choose_device(None) == CPU
    assert choose_device("cpu") == CPU


def test_cuda_comes_before_mps_and_mps_before_the_cpu(machine: pytest.MonkeyPatch) -> None:
    add_mps(machine)
    assert choose_device(None) == MPS
    add_cuda(machine, 2)
    assert choose_device(None) == CUDA
    assert choose_device("cuda") == CUDA
    assert choose_device("cuda:1") == torch.device("cuda:1")
    assert choose_device("mps") == MPS
    assert choose_device("cpu") == CPU


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps", "gpu", ""])
def test_a_missing_device_is_refused_with_a_list_of_devices(machine: pytest.MonkeyPatch, name: str) -> None:
    with pytest.raises(FlawmaskError, match=f"--device {name} is not there: this machine has cpu$"):
        choose_device(name)


def test_a_cuda_device_number_too_high_is_refused_with_a_list_of_devices(machine: pytest.MonkeyPatch) -> None:
    add_cuda(machine, 2)
    with pytest.raises(FlawmaskError, match="cuda:2 is not there: this machine has cuda:0, cuda:1, cpu"):
        choose_device("cuda:2")


@pytest.mark.parametrize(("old", "refused"), [("0.26.0", True), ("0.28.1+cpu", True), ("0.29.0", False)])
def test_training_on_mps_is_refused_with_wrong_roi_align_gradients(
    monkeypatch: pytest.MonkeyPatch, old: str, refused: bool
) -> None:
    monkeypatch.setattr(torchvision, "__version__", old)
    refuse_wrong_gradients(CPU)
    refuse_wrong_gradients(CUDA)
    if not refused:
        refuse_wrong_gradients(MPS)
        return
    with pytest.raises(FlawmaskError, match=r"wrong RoIAlign gradients on MPS: install 0\.29 .* --device cpu"):
        refuse_wrong_gradients(MPS)


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("device", [CPU, CUDA, MPS])
def test_a_named_precision_is_used(name: Precision, dtype: torch.dtype, device: torch.device) -> None:
    assert choose_precision(name, device) == dtype


def test_fp16_needs_cuda() -> None:
    assert choose_precision("fp16", CUDA) == torch.float16
    for device in (CPU, MPS):
        with pytest.raises(FlawmaskError, match="--precision fp16 needs CUDA"):
            choose_precision("fp16", device)


@pytest.mark.usefixtures("second_gpu")
@pytest.mark.parametrize("has_it", [True, False])
def test_auto_is_bf16_where_the_hardware_multiplies_it(monkeypatch: pytest.MonkeyPatch, has_it: bool) -> None:
    expected = torch.bfloat16 if has_it else torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_it or including_emulation)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_it)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert choose_precision("auto", CUDA) == expected
    assert choose_precision("auto", CPU) == expected
    assert choose_precision("auto", MPS) == torch.float32


@pytest.mark.parametrize("has_amx", [True, False])
@pytest.mark.parametrize("is_intel", [True, False])
def test_auto_is_float32_where_only_intels_slow_bf16_is_there(
    monkeypatch: pytest.MonkeyPatch, is_intel: bool, has_amx: bool
) -> None:
    monkeypatch.setattr(runtime, "_is_intel", lambda: is_intel)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert choose_precision("auto", CPU) == (torch.bfloat16 if has_amx or not is_intel else torch.float32)


@pytest.mark.skipif(not hasattr(torch.cpu, "get_capabilities"), reason="this PyTorch does not name the CPU")
@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no CPU with AVX-512 BF16")
def test_an_intel_cpu_is_known_as_one() -> None:
    assert runtime._is_intel() == ("Intel" in torch.cpu.get_capabilities().get("cpu_name", ""))


@pytest.mark.parametrize("seed", [0, 42, 2**40])
def test_a_seed_decides_all_three_generators(seed: int) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.random()), float(torch.rand(()))  # noqa: NPY002

    seed_everything(seed)
    first = draw()
    seed_everything(seed)
    assert draw() == first
    seed_everything(seed + 1)
    assert all(one != other for one, other in zip(draw(), first, strict=True))


def test_each_process_of_a_machine_has_its_own_gpu(machine: pytest.MonkeyPatch) -> None:
    add_cuda(machine, 2)
    machine.setenv("LOCAL_RANK", "1")
    assert choose_device(None) == choose_device("cuda") == torch.device("cuda:1")
    machine.setenv("LOCAL_RANK", "2")
    with pytest.raises(FlawmaskError, match="is not there: this machine has cuda:0, cuda:1, cpu"):
        choose_device("cuda")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"),
            True,
        ),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_out_of_memory_is_distinguished_from_other_errors(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


AFTER = """
import sys, torch
from flawmask.launch import own_process
from flawmask.runtime import keep_freed_memory

def resident():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) // 1024

def left():
    before = resident()
    block = torch.ones(60 * 2**20)
    del block
    return resident() - before

print(left())
keep_freed_memory(torch.device("cpu"))
print(left())
own_process()
keep_freed_memory(torch.device("meta"))
print(left())
keep_freed_memory(torch.device("cpu"))
print(left())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep what is freed")
def test_memory_freed_by_a_layer_is_kept_for_the_next_on_a_cpu() -> None:
    done = subprocess.run([sys.executable, "-c", AFTER], check=True, capture_output=True, text=True)
    as_it_is, in_anothers_program, on_another_device, kept = map(int, done.stdout.split())
    assert as_it_is < 40
    assert in_anothers_program < 40, "a program that imports Flawmask keeps its own way"
    assert on_another_device < 40, "another device has memory of its own"
    assert kept > 200


CUDNN: Any = torch.backends.cudnn
MATMUL: Any = torch.backends.cuda.matmul


def tf32() -> tuple[Any, ...]:
    """Return PyTorch's newer settings of TF32 and, if they can be read, the older ones."""
    newer = (CUDNN.conv.fp32_precision, CUDNN.rnn.fp32_precision, MATMUL.fp32_precision)
    older = (lambda: CUDNN.allow_tf32, lambda: MATMUL.allow_tf32, torch.get_float32_matmul_precision)
    return (*newer, *(said(one) for one in older))


def said(setting: Callable[[], Any]) -> Any:
    try:
        return setting()
    except RuntimeError:
        return "mixed"


@pytest.fixture
def settings_of_tf32() -> Iterator[None]:
    before = (CUDNN.allow_tf32, torch.get_float32_matmul_precision())
    yield
    for one in (CUDNN.conv, CUDNN.rnn, MATMUL):
        one.fp32_precision = "none"
    CUDNN.allow_tf32 = before[0]
    torch.set_float32_matmul_precision(before[1])


@pytest.mark.usefixtures("settings_of_tf32")
@pytest.mark.parametrize("host", ["default", "older", "newer", "off", "mixed"])
def test_float32_is_ieee_inside_our_calls_and_the_callers_settings_are_restored(host: str) -> None:
    if host == "older":
        torch.set_float32_matmul_precision("high")
    elif host == "newer":
        CUDNN.conv.fp32_precision = CUDNN.rnn.fp32_precision = MATMUL.fp32_precision = "tf32"
    elif host == "off":
        CUDNN.allow_tf32 = False
    elif host == "mixed":
        CUDNN.conv.fp32_precision = "ieee"
    before = tf32()
    assert host == "off" or "tf32" in before
    with ieee_float32():
        assert "tf32" not in tf32()
        assert host == "mixed" or CUDNN.allow_tf32 is False
        with ieee_float32():
            assert "tf32" not in tf32()
        assert "tf32" not in tf32()
    assert tf32() == before
    with pytest.raises(KeyError), ieee_float32():
        raise KeyError
    assert tf32() == before


def test_float32_stays_ieee_until_the_last_thread_leaves() -> None:
    before = tf32()
    entered, leave = threading.Event(), threading.Event()

    def stay() -> None:
        with ieee_float32():
            entered.set()
            assert leave.wait(timeout=60)

    thread = threading.Thread(target=stay)
    with ieee_float32():
        thread.start()
        assert entered.wait(timeout=60)
    assert "tf32" not in tf32()
    leave.set()
    thread.join()
    assert tf32() == before


@pytest.fixture
def second_gpu(machine: pytest.MonkeyPatch) -> list[int]:
    """Simulate a machine with two GPUs; the caller uses the first. The last entry of the list is the current GPU."""
    add_cuda(machine, 2)
    current = [0]

    def exchange(index: int) -> int:
        current.append(index)
        return current[-2]

    machine.setattr(torch.cuda, "_exchange_device", exchange)
    machine.setattr(torch.cuda, "_maybe_exchange_device", exchange)
    return current


def test_the_current_gpu_is_the_networks_inside_our_calls_and_the_callers_afterwards(second_gpu: list[int]) -> None:
    with processes(torch.device("cuda:1")) as team:
        assert team == Processes()
        assert second_gpu[-1] == 1
    assert second_gpu[-1] == 0
    with on_device(CPU):
        assert second_gpu[-1] == 0


def test_bf16_support_is_checked_on_the_gpu_itself(second_gpu: list[int], machine: pytest.MonkeyPatch) -> None:
    machine.setattr(torch.cuda, "is_bf16_supported", lambda **_: second_gpu[-1] == 1)
    assert choose_precision("auto", torch.device("cuda:1")) == torch.bfloat16
    assert choose_precision("auto", torch.device("cuda:0")) == torch.float32


def test_a_predictor_loads_and_predicts_with_its_own_gpu_as_the_current_one(
    second_gpu: list[int], machine: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def noting(result: Any) -> Callable[..., Any]:
        def noted(*_: Any, **__: Any) -> Any:
            seen.append(second_gpu[-1])
            return result

        return noted

    spec = ModelSpec("fcos_resnet50_fpn", ("good", "defect"))
    machine.setattr(torch_backend, "choose_precision", noting(torch.float32))
    machine.setattr(checkpoint, "load", noting((None, spec)))
    network = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=torch.device("cuda:1"))]))
    machine.setattr(torch_backend, "optimise_for_inference", noting(network))
    machine.setattr(torch_backend, "set_score_floor", noting(None))
    found = Predictor("best.pt", "cuda:1").backend
    assert seen
    assert set(seen) == {1}
    nothing = {name: torch.zeros(0) for name in ("boxes", "labels", "scores")}
    machine.setattr(torch_backend, "detector_of", lambda _: SimpleNamespace(infer=noting([nothing])))
    machine.setattr(torch_backend, "uploaded", noting([]))
    found.infer([Resized(np.zeros((4, 4, 3), dtype=np.uint8), 4, 4)])
    assert set(seen) == {1}
    assert second_gpu[-1] == 0

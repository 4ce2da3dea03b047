"""The cores and the memory that a process may use, its environment and its imports, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from random_network import SPEC, network, patchwork

from flawmask import launch
from flawmask.images import encode_png
from flawmask.launch import KERNEL_CACHE, WAITING, control_groups, usable_cores, visible_cores
from flawmask.model import checkpoint
from flawmask.training.fit import free_memory
from flawmask.training.loader import default_workers

NAMES = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "OPENCV_FOR_THREADS_NUM")


def tree(folder: Path, groups: str, mounts: dict[str, str], files: dict[str, str]) -> Path:
    """Lay out a process' folder and its control groups.

    Args:
        folder: where.
        groups: the process' `cgroup`.
        mounts: by mount point below `folder`, what `mountinfo` says: the root, and the kind and its options.
        files: the groups' files below `folder`.
    """
    process = folder / "self"
    process.mkdir(parents=True)
    (process / "cgroup").write_text(groups)
    lines = ["22 27 0:21 / /proc rw,relatime - proc proc rw", "23 27 0:9 / /some rw - tmpfs  rw"]
    for number, (point, (root, _, kind)) in enumerate((at, what.partition(" ")) for at, what in mounts.items()):
        lines.append(f"{number} 1 0:{number} {root} {folder / point} rw,relatime shared:9 - {kind}")
    (process / "mountinfo").write_text("\n".join(lines))
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return process


SECOND = {"cg": "/ cgroup2 cgroup rw,nsdelegate"}
FIRST = {"cg/cpu": "/ cgroup cgroup rw,cpu,cpuacct", "cg/memory": "/ cgroup cgroup rw,memory"}

TREES = {
    "v2": ("0::/a/b\n", SECOND, {"cg/a/b/cpu.max": "300000 100000\n", "cg/a/cpu.max": "max 100000\n"}, 3),
    "v2, a tighter limit above": ("0::/a/b\n", SECOND, {"cg/a/b/cpu.max": "3 1", "cg/a/cpu.max": "2 1"}, 2),
    "v2, the tightest limit at the mount": ("0::/a/b\n", SECOND, {"cg/a/b/cpu.max": "3 1", "cg/cpu.max": "1 1"}, 1),
    "v2, another group's limit": ("0::/a/b\n", SECOND, {"cg/a/c/cpu.max": "1 1"}, 64),
    "v2, namespaced": ("0::/\n", SECOND, {"cg/cpu.max": "200000 100000\n"}, 2),
    "v2, outside the namespace": ("0::/../other\n", SECOND, {"cg/cpu.max": "2 1", "other/cpu.max": "1 1"}, 2),
    "v2, a part of it mounted": ("0::/a/b/c\n", {"cg": "/a/b cgroup2 cgroup rw"}, {"cg/c/cpu.max": "2 1"}, 2),
    "v2, the host's path": ("0::/docker/x\n", SECOND, {"cg/cpu.max": "2 1"}, 2),
    "v2, half a core more": ("0::/a\n", SECOND, {"cg/a/cpu.max": "250000 100000"}, 3),
    "v2, a tenth of a core": ("0::/a\n", SECOND, {"cg/a/cpu.max": "10000 100000"}, 1),
    "v2, more than there are": ("0::/a\n", SECOND, {"cg/a/cpu.max": "9900000 100000"}, 64),
    "v1": (
        "4:memory:/m\n3:cpu,cpuacct:/a/b\n",
        FIRST,
        {"cg/cpu/a/b/cpu.cfs_quota_us": "200000\n", "cg/cpu/a/b/cpu.cfs_period_us": "100000\n"},
        2,
    ),
    "v1, no limit": (
        "3:cpu,cpuacct:/a\n",
        FIRST,
        {"cg/cpu/a/cpu.cfs_quota_us": "-1\n", "cg/cpu/a/cpu.cfs_period_us": "100000\n"},
        64,
    ),
    "v1, a tighter limit above": (
        "3:cpu,cpuacct:/a/b\n",
        FIRST,
        {
            "cg/cpu/a/b/cpu.cfs_quota_us": "-1\n",
            "cg/cpu/a/b/cpu.cfs_period_us": "100000\n",
            "cg/cpu/a/cpu.cfs_quota_us": "150000\n",
            "cg/cpu/a/cpu.cfs_period_us": "50000\n",
        },
        3,
    ),
    "v1, a container without a namespace": (
        "3:cpu,cpuacct:/docker/x\n",
        {"cg/cpu": "/docker/x cgroup cgroup rw,cpu,cpuacct"},
        {"cg/cpu/cpu.cfs_quota_us": "200000\n", "cg/cpu/cpu.cfs_period_us": "100000\n"},
        2,
    ),
    "both, the first has the cpu": (
        "3:cpu:/a\n0::/u\n",
        FIRST | {"cg/unified": "/ cgroup2 cgroup2 rw"},
        {"cg/cpu/a/cpu.cfs_quota_us": "200000\n", "cg/cpu/a/cpu.cfs_period_us": "100000\n", "cg/unified/u/x": ""},
        2,
    ),
    "none": ("", {}, {}, 64),
}


@pytest.mark.parametrize("name", TREES)
def test_the_tightest_quota_on_the_process_path_counts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups, mounts, files, cores = TREES[name]
    monkeypatch.setattr(launch, "visible_cores", lambda: 64)
    assert usable_cores(tree(tmp_path, groups, mounts, files)) == cores


def test_without_control_groups_the_cores_of_the_system_count(tmp_path: Path) -> None:
    assert usable_cores(tmp_path / "nothing") == visible_cores()
    assert list(control_groups("memory", tmp_path / "nothing")) == []


def test_a_quota_of_two_of_64_cores_does_not_start_64_readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = tree(tmp_path, "0::/a\n", SECOND, {"cg/a/cpu.max": "200000 100000"})
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(usable_cores, "__defaults__", (process,))
    assert (default_workers(on_cuda=False), default_workers(on_cuda=True)) == (1, 1)


def test_the_tightest_group_limits_free_memory(tmp_path: Path) -> None:
    second = {
        "cg/a/memory.max": "3000000\n",
        "cg/a/memory.current": "2000000\n",
        "cg/a/memory.stat": "anon 5\ninactive_file 400000\n",
        "cg/a/b/memory.max": "max\n",
        "cg/a/b/memory.current": "1\n",
        "cg/a/b/memory.stat": "inactive_file 0\n",
    }
    first = {
        "cg/memory/m/memory.limit_in_bytes": "3000000\n",
        "cg/memory/m/memory.usage_in_bytes": "2500000\n",
        "cg/memory/m/memory.stat": "inactive_file 7\ntotal_inactive_file 100000\n",
        "cg/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "cg/memory/memory.usage_in_bytes": "2500000\n",
        "cg/memory/memory.stat": "total_inactive_file 100000\n",
    }
    if free_memory(tmp_path) == 0:
        pytest.skip("only Linux says it")
    assert free_memory(tree(tmp_path / "second", "0::/a/b\n", SECOND, second)) == 1_400_000
    assert free_memory(tree(tmp_path / "first", "4:memory:/m\n", FIRST, first)) == 600_000


def said(code: str, *arguments: str | Path, **environment: str) -> str:
    """Run Python code in a process with only these variables about threads, and return what it prints."""
    bare = {name: value for name, value in os.environ.items() if name not in (*NAMES, *WAITING, *KERNEL_CACHE)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=bare | environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


SHOW = f"import os; print(*(os.environ.get(name, '-') for name in {NAMES}))"
QUOTA = """import os
from flawmask import launch
launch.visible_cores, launch.usable_cores = lambda: 64, lambda: 1
launch.set_environment()
"""


def test_importing_flawmask_makes_waiting_threads_sleep() -> None:
    assert said(f"import flawmask; {SHOW}").split()[0] == "passive"
    assert said(f"import runpy; runpy.run_module('flawmask', run_name='other'); {SHOW}").split()[0] == "passive"


def test_the_users_environment_wins() -> None:
    assert said(f"import flawmask; {SHOW}", OMP_WAIT_POLICY="active").split()[0] == "active"
    told = "import os, flawmask; print(os.environ.get('GOMP_SPINCOUNT'))"
    assert said(told, OMP_WAIT_POLICY="active").split() == ["None"], "it would overrule the policy"
    shown = said(QUOTA + SHOW, OMP_NUM_THREADS="3", OPENCV_FOR_THREADS_NUM="5")
    assert shown == "passive 3 5"


def test_onednn_keeps_the_kernels_of_images_of_many_sizes() -> None:
    shown = f"import os, flawmask; print(*(os.environ.get(name) for name in {list(KERNEL_CACHE)}))"
    assert said(shown).split() == ["40000"]
    assert said(shown, ONEDNN_PRIMITIVE_CACHE_CAPACITY="7").split() == ["7"]


def test_nothing_is_set_once_torch_is_loaded() -> None:
    assert said(f"import torch, flawmask; {SHOW}") == "- - -"


def test_a_quota_limits_the_threads_of_the_libraries() -> None:
    counts = "import torch, cv2; print(torch.get_num_threads(), cv2.getNumThreads())"
    assert said(QUOTA + counts) == "1 1"


def test_without_a_quota_the_libraries_decide() -> None:
    if usable_cores() < visible_cores():
        pytest.skip("the tests run under a quota")
    assert said(f"import flawmask; {SHOW}") == "passive - -"


@pytest.mark.parametrize("command", ["", "predict", "train", "run", "compare"])
def test_help_loads_nothing_that_it_does_not_need(command: str) -> None:
    loaded = loaded_by(*([command] if command else []), "--help")
    assert not loaded & {"torch", "torchvision", "scipy", "matplotlib", "hotcoco"}


@pytest.mark.slow
def test_predict_loads_nothing_that_it_does_not_need(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "best.pt", network(), SPEC)
    (tmp_path / "part.png").write_bytes(encode_png(patchwork(80, 90)))
    flags = {"model": "best.pt", "input": "part.png", "output": "found"}
    loaded = loaded_by("predict", *(word for name, at in flags.items() for word in (f"--{name}", tmp_path / at)))
    assert "torchvision" in loaded
    assert not loaded & {"torch._dynamo", "sympy", "matplotlib", "scipy", "hotcoco", "ultralytics", "transformers"}


def loaded_by(*arguments: str | Path) -> set[str]:
    """Return the modules that a command has loaded when it ends."""
    code = """
import sys
from flawmask.cli import main
try:
    main()
finally:
    print("\\n" + " ".join(sys.modules))
"""
    return set(said(code, *arguments).split())


@pytest.mark.slow
def test_the_compiler_is_imported_when_it_is_used() -> None:
    code = """
import sys
from flawmask import torchvision_alone
from torchvision.ops.roi_align import is_compile_supported
before = "torch._dynamo" in sys.modules
answer = is_compile_supported("cpu")
from torch._dynamo import utils
print(before, answer == utils.is_compile_supported("cpu"))
"""
    assert said(code) == "False True"

"""Memory limits, read from made-up /proc and /sys trees."""

from duetto.runner.host_memory import available_memory_bytes

GIB = 2**30


def tree(root, **files):
    for name, text in files.items():
        file = root / name.replace("__", "/").replace("--", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def meminfo(root, gib):
    kib = gib * 2**20
    text = f"MemTotal: {64 * 2**20} kB\nMemFree: 1000 kB\nMemAvailable: {kib} kB\n"
    return tree(root, proc__meminfo=text)


def group(root, directory, limit, current, inactive_file=0):
    """A control group of version 2."""
    path = root / "sys/fs/cgroup" / directory
    path.mkdir(parents=True, exist_ok=True)
    (path / "memory.max").write_text(f"{limit}\n")
    (path / "memory.current").write_text(f"{current}\n")
    (path / "memory.stat").write_text(f"anon 5\ninactive_file {inactive_file}\n")


def test_without_limits_it_is_what_the_machine_has_left(tmp_path):
    assert available_memory_bytes(meminfo(tmp_path, 10)) == 10 * GIB


def test_a_groups_limit_counts_less_what_it_uses_but_not_its_page_cache(tmp_path):
    tree(meminfo(tmp_path, 10), proc__self__cgroup="0::/service\n")
    group(tmp_path, "service", 4 * GIB, 3 * GIB, inactive_file=GIB)
    assert available_memory_bytes(tmp_path) == 2 * GIB


def test_the_tightest_of_the_enclosing_groups_counts(tmp_path):
    tree(meminfo(tmp_path, 10), proc__self__cgroup="0::/slice/service\n")
    group(tmp_path, "slice/service", "max", 0)
    group(tmp_path, "slice", 2 * GIB, GIB)
    assert available_memory_bytes(tmp_path) == GIB


def test_a_path_from_outside_a_container_falls_back_to_the_mount(tmp_path):
    tree(meminfo(tmp_path, 10), proc__self__cgroup="0::/../host/path\n")
    group(tmp_path, ".", 3 * GIB, 0)
    assert available_memory_bytes(tmp_path) == 3 * GIB


def test_version_1_of_control_groups_is_read_too(tmp_path):
    meminfo(tmp_path, 10)
    tree(tmp_path, proc__self__cgroup="5:cpu,cpuacct:/\n4:memory:/job\n0::/\n")
    tree(
        tmp_path / "sys/fs/cgroup/memory/job",
        **{
            "memory.limit_in_bytes": str(6 * GIB),
            "memory.usage_in_bytes": str(2 * GIB),
            "memory.stat": f"inactive_file 0\ntotal_inactive_file {GIB}\n",
        },
    )
    assert available_memory_bytes(tmp_path) == 5 * GIB


def test_a_group_beyond_its_limit_leaves_nothing(tmp_path):
    tree(meminfo(tmp_path, 10), proc__self__cgroup="0::/\n")
    group(tmp_path, ".", GIB, 2 * GIB)
    assert available_memory_bytes(tmp_path) == 0


def test_where_nothing_can_be_read_there_is_still_an_answer(tmp_path):
    assert available_memory_bytes(tmp_path) > 0


def test_this_machine_has_some_memory_left():
    assert available_memory_bytes() > 0

"""What XLA and the C library are told: their own settings stay the user's."""

import os
import re
import subprocess
import sys

import jax
import pytest

from sorax import backend


@pytest.fixture
def flags(monkeypatch):
    if not backend.knows_flags():
        pytest.skip("the flags are of jaxlib 0.10")
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=true")
    return lambda: os.environ["XLA_FLAGS"].split()


def test_flags_are_added_to_the_users(flags):
    backend.configure()
    assert "--xla_cpu_multi_thread_eigen=true" in flags()
    assert backend.CPU_KERNELS in flags()


def test_a_users_own_choice_of_kernels_stays(flags, monkeypatch):
    own = f"{backend.CPU_KERNELS.partition('=')[0]}=LIBRARY_FUSION_TYPE_REDUCE"
    monkeypatch.setenv("XLA_FLAGS", own)
    backend.configure()
    assert own in flags() and backend.CPU_KERNELS not in flags()
    assert backend.forward_options() == {}


def test_a_program_without_a_backward_pass_has_options_that_xla_knows(flags):
    backend.configure()
    options = backend.forward_options()
    assert float(jax.jit(lambda x: x @ x, compiler_options=options)(jax.numpy.ones((2, 2)))[0, 0]) == 2
    assert options == (backend.FORWARD if jax.default_backend() == "cpu" else {})


def pages_of(command, **environment):
    """How much of the memory that a program takes is in large pages, in kB."""
    found = subprocess.run([sys.executable, "-c", command], env=os.environ | environment, check=True, text=True,
                           stdout=subprocess.PIPE)  # fmt: skip
    return int(re.search(r"AnonHugePages: +(\d+) kB", found.stdout)[1])


def test_a_program_that_starts_again_has_its_memory_in_large_pages_and_starts_again_once(monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if not backend.large_pages():
        pytest.skip("this system's C library or kernel has no large pages for those who ask")
    assert backend.large_pages() == {"GLIBC_TUNABLES": backend.LARGE_PAGES}
    take = "import ctypes; b = ctypes.create_string_buffer(64 << 20); print(open('/proc/self/smaps_rollup').read())"
    again = "from sorax import backend; backend.start_again_with_large_pages(); "
    assert pages_of(again + take) >= 32 << 10 > pages_of(take)
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")  # the user's own choice
    assert backend.large_pages() == {}
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.perturb=0")
    assert backend.large_pages() == {"GLIBC_TUNABLES": f"glibc.malloc.perturb=0:{backend.LARGE_PAGES}"}

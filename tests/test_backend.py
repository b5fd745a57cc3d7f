"""What XLA is told: its own flags stay the user's."""

import os

import jax
import pytest

from sorax import backend

pytestmark = pytest.mark.skipif(not backend.knows_flags(), reason="the flags are of jaxlib 0.10")


@pytest.fixture
def flags(monkeypatch):
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

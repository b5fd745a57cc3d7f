"""What must be set before jax is imported, or before the process starts, and where compiled programs are kept."""

import importlib.metadata
import os
import platform
import sys

# XLA's faster CPU kernels for products and reductions: a training step of the DiT takes 132 ms in place of 242 on 2
# cores. An experimental flag, so it is set only for the releases that are known to have it.
CPU_KERNELS = "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_REDUCE"
# Loops over 512-bit vectors where the processor has them, in place of 256: small batches take a fifth less CPU time.
CPU_VECTORS = "--xla_cpu_prefer_vector_width=512"
# Without a backward pass, the products are faster by XLA's older kernels: sampling takes a fifth less CPU time at a
# width of 384, a tenth less at 128.
FORWARD = {"xla_cpu_experimental_ynn_fusion_type": ""}

# glibc asks for pages of 2 MiB. XLA gives the memory of a step back after it, and with pages of 4 KiB up to a fifth of
# a training step goes into getting it anew. glibc reads this once, before the program.
LARGE_PAGES = "glibc.malloc.hugetlb=1"


def knows_flags() -> bool:
    """Whether jaxlib is of the releases that are known to have these flags: others stop at what they know not."""
    return importlib.metadata.version("jaxlib").startswith("0.10.")


def configure():
    """Adds the flags that make XLA fast on a CPU, unless the user has set his own value."""
    flags = os.environ.get("XLA_FLAGS", "")
    if knows_flags():
        own = [flag for flag in (CPU_KERNELS, CPU_VECTORS) if flag.partition("=")[0] not in flags]
        os.environ["XLA_FLAGS"] = " ".join([*own, flags]).strip()


def large_pages() -> dict[str, str]:
    """Environment of a process that is to use large pages; {} where it would change nothing, or the user has chosen."""
    given = os.environ.get("GLIBC_TUNABLES", "")
    name, version = platform.libc_ver()
    has_it = name == "glibc" and tuple(map(int, version.split(".")[:2])) >= (2, 35)
    try:
        with open("/sys/kernel/mm/transparent_hugepage/enabled") as f:
            for_those_who_ask = "[madvise]" in f.read()
    except OSError:
        for_those_who_ask = False
    if not (has_it and for_those_who_ask) or "hugetlb" in given:
        return {}
    return {"GLIBC_TUNABLES": ":".join(filter(None, (given, LARGE_PAGES)))}


def start_again_with_large_pages():
    """Becomes the same program once more, with `large_pages`, if it has not begun with them. For the start of one."""
    if more := large_pages():
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | more)


def forward_options() -> dict[str, str]:
    """`compiler_options` of `jax.jit` for a program without a backward pass, unless the user has set his own value."""
    import jax

    given = os.environ.get("XLA_FLAGS", "")
    ours = CPU_KERNELS in given or CPU_KERNELS.partition("=")[0] not in given
    return FORWARD if knows_flags() and ours and jax.default_backend() == "cpu" else {}


def keep_programs():
    """Keeps compiled programs in the user's cache folder, so that a run that goes on need not compile again.

    Where JAX_COMPILATION_CACHE_DIR is set, they are there. Not on a CPU: a program is made for one processor, and a
    home folder may be seen by several.
    """
    import jax

    if jax.config.jax_compilation_cache_dir is None and jax.default_backend() != "cpu":
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "sorax", "programs"))

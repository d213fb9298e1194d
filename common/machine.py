"""How the machine is used: one graph per update, the kind of products, memory. It moves a policy's last digits only."""

import ctypes
import sys
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor
from tqdm import tqdm


def progress_bar(name: str, total: int | None, unit: str, **settings) -> tqdm:
    """Drawn all the time on a screen, but twice a minute in a log file."""
    interval = 0.1 if sys.stderr.isatty() else 30
    return tqdm(desc=name, total=total, unit=unit, mininterval=interval, leave=False, **settings)


def keep_freed_memory() -> None:
    """Else glibc hands large buffers back to Linux, which zeroes each page anew: up to a quarter of a large update."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap's end stays
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no buffer in a mapping of its own


def exact_products(device: torch.device) -> None:
    """Of float32. On a CPU by oneDNN ("medium"), on AMD twice as fast as MKL, unless it rounds to bfloat16 (AMX)."""
    torch.set_float32_matmul_precision("medium")
    third = torch.full((64, 64), 1 / 3, device=device)
    if device.type != "cpu" or not torch.allclose(third @ third, torch.full_like(third, 64 / 9), rtol=1e-5):
        torch.set_float32_matmul_precision("highest")


def compiled(function: Callable, device: torch.device) -> Callable:
    """One graph out of `function`, which may call torch.autograd.grad; `function` itself where that cannot be had."""
    with suppress(AttributeError):  # older than torch 2.13, which then goes on eagerly
        torch._dynamo.config.trace_autograd_ops = True
    # the compiler counts graphs by this object and refuses the ninth, that of the ninth run in a notebook
    function.__code__ = function.__code__.replace()
    # on a GPU a CUDA graph as well: one launch instead of hundreds, whose outputs the next call overwrites
    mode, graph = "reduce-overhead" if device.type == "cuda" else "default", None

    def call(*inputs: Tensor):
        nonlocal graph
        try:
            graph = graph or torch.compile(function, fullgraph=True, mode=mode)
            return graph(*inputs)
        except (torch._dynamo.exc.TorchDynamoException, OSError) as error:  # before anything ran: no update twice
            print(f"compile     does not work here, going on eagerly and slower ({str(error).strip().splitlines()[0]})")
            graph = function
            return function(*inputs)

    return call

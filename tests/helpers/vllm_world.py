"""vLLM's own layers in one process without a GPU, for the tests that need the real package."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def vllm_world() -> Iterator[None]:
    """vLLM's settings, and the group of one process in which its layers look up their rank."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state as state

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    with set_current_vllm_config(VllmConfig()):
        state.init_distributed_environment(1, 0, address, 0, backend="gloo")
        state.initialize_model_parallel(1, backend="gloo")
        yield
        state.destroy_model_parallel()
        state.destroy_distributed_environment()

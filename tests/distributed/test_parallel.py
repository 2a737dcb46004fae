from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from shiftadd_cli.distributed.parallel import map_pieces


@pytest.fixture(params=[1, 2, 3])
def workers(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_are_in_order_from_workers_with_one_thread_each(workers: int) -> None:
    results = map_pieces(lambda i: (i, torch.get_num_threads(), threading.current_thread().name), range(20))
    assert [i for i, _, _ in results] == list(range(20))
    assert {threads for _, threads, _ in results} == {1}
    assert len({name for _, _, name in results}) <= workers
    assert torch.get_num_threads() == workers


def test_error_reaches_the_caller_and_threads_are_restored(workers: int) -> None:
    def fail(i: int) -> int:
        if i == 3:
            raise ArithmeticError("piece 3")
        return i

    with pytest.raises(ArithmeticError, match="piece 3"):
        map_pieces(fail, range(6))
    assert torch.get_num_threads() == workers
    fresh: list[int] = []
    thread = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert fresh == [workers]

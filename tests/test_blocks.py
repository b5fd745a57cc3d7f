import errno
import os

import numpy as np
import pytest

from data_pipelines.blocks import Blocks, Received
from sorax.errors import UserError


def send(blocks, value):
    with blocks.empty(value.shape, value.dtype) as array:
        array[...] = value
        return blocks.refer(array)


def test_a_block_is_used_again_when_the_last_view_of_it_is_gone(tmp_path):
    blocks, received = Blocks(tmp_path, "a"), Received(tmp_path)
    first = received.array(send(blocks, np.full((3, 4), 7, np.int32)))
    view = first[1:].reshape(-1).view(np.uint32)[::2]
    del first
    second = send(blocks, np.full((3, 4), 8, np.int32))
    np.testing.assert_array_equal(view, np.full(4, 7))
    assert len(list(tmp_path.iterdir())) == 2
    del view
    assert send(blocks, np.full((2, 6), 9, np.int16)).file != second.file  # smaller, in the room of the first
    np.testing.assert_array_equal(received.array(second), np.full((3, 4), 8))
    assert len(list(tmp_path.iterdir())) == 2


def test_a_larger_array_takes_the_place_of_free_blocks(tmp_path):
    blocks, received = Blocks(tmp_path, "a"), Received(tmp_path)
    for size in (1, 1 << 12, 1 << 14):
        array = received.array(send(blocks, np.arange(size)))
        np.testing.assert_array_equal(array, np.arange(size))
        del array
        assert len(list(tmp_path.iterdir())) == 1
    assert len(received._blocks) == 1


def test_an_array_that_is_not_finished_gives_its_block_back(tmp_path):
    blocks = Blocks(tmp_path, "a")
    for _ in range(3):
        with pytest.raises(KeyError), blocks.empty((5,), np.uint8):
            raise KeyError
    assert len(list(tmp_path.iterdir())) == 1


def test_only_arrays_in_blocks_are_sent_as_references(tmp_path):
    blocks, received, other = Blocks(tmp_path, "a"), Received(tmp_path), np.arange(3)
    assert blocks.refer(other) is other and received.array(other) is other and received.array("x") == "x"


def test_full_shared_memory_is_an_error_that_says_so(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"no room for a batch of 8 MiB.*--shm-size"):
        send(Blocks(tmp_path, "a"), np.zeros(1 << 20))
    assert not list(tmp_path.iterdir())

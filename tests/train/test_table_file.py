"""Tables in a file: what was written stays when memory is let go, and a full disk is said early."""

import resource

import pytest
import torch
from torch import nn

from twotower.train.checkpoint.table_file import TableFile


def test_tables_keep_their_rows_when_their_memory_is_released(tmp_path) -> None:
    weights = [nn.Parameter(torch.empty(rows, 8)) for rows in (3, 700, 1)]
    file = TableFile(tmp_path)
    file.move(weights)
    assert list(tmp_path.iterdir()) == [], "no name, so nothing to clean up after a kill"
    expected = [torch.randn_like(weight) for weight in weights]
    with torch.no_grad():
        for weight, value in zip(weights, expected, strict=True):
            weight.copy_(value)
    for _ in range(2):
        file.release()
        for weight, value in zip(weights, expected, strict=True):
            torch.testing.assert_close(weight.data, value, rtol=0, atol=0)


def test_no_room_on_the_disk_is_an_error_that_names_the_folder(tmp_path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        with pytest.raises(OSError, match=tmp_path.name) as raised:
            TableFile(tmp_path).move([nn.Parameter(torch.empty(1 << 16, 8))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert raised.value.filename == str(tmp_path)
    assert list(tmp_path.iterdir()) == []

from __future__ import annotations

import pytest
import torch

from soap_net.errors import UserError
from soap_net.ranks import Ranks, join, pick_device


def test_a_device_that_is_not_there_is_named_with_those_that_are() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda", "xpu", "mps")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"device is 'cuda:1': not on this machine, which has .*cpu"):
            pick_device("cuda:1")


def test_alone_a_sum_is_the_value_itself() -> None:
    with join("cpu") as ranks:
        assert ranks == Ranks(torch.device("cpu"), 0, 1)
        assert ranks.first
        value = torch.tensor([3.0])
        ranks.sum([value])
        ranks.wait()
        assert value == 3

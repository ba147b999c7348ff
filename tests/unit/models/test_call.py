import torch
from torch import nn

from kernel_pytorch.models.call import CallWorkload


class TwoHeads(nn.Module):
    def forward(self, x, *, scale):
        return {"a": x * scale, "b": x[:, :1]}


def test_own_input_gives_as_many_rows_as_it_has():
    x = torch.arange(6.0).view(3, 2)
    workload = CallWorkload((x,), {"scale": 2.0})
    rows = list(workload.held_out(TwoHeads(), 256))
    assert [row.tolist() for row in rows] == [[[0, 2, 0], [4, 6, 2], [8, 10, 4]]]
    assert (workload.batch, workload.length, workload.tokens_per_call, workload.phase) == (3, None, None, "forward")


def test_held_out_calls_are_used_until_there_are_enough_rows():
    calls = [((torch.full((2, 2), float(n)),), {"scale": 1.0}) for n in range(5)]
    workload = CallWorkload((torch.full((4, 2), 9.0),), {"scale": 1.0}, held_out=calls)
    rows = torch.cat(list(workload.held_out(TwoHeads(), 5)))
    assert rows[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert workload.call(TwoHeads())["a"].tolist() == [[9.0, 9.0]] * 4
    assert workload.probe(TwoHeads())["a"].tolist() == [[0.0, 0.0]] * 2


def test_batch_is_of_the_first_tensor_of_any_nesting():
    assert CallWorkload(([{"ids": torch.ones(7, 2, dtype=torch.int64)}],)).batch == 7
    assert CallWorkload((3.0,), {"scale": torch.tensor(1.0)}).batch == 1

"""Multiply-adds of recurrent layers against counts made by hand, whatever kernel computes them."""

from collections.abc import Callable

import pytest
import torch
from network_corpus import saved
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.flop_counter import FlopCounterMode

from worker.engine.network.costs import count_macs, take_census
from worker.engine.network.load import load_model
from worker.engine.network.recurrent_kernels import RECURRENT_KERNELS

STEPS, WIDTH, HIDDEN, PROJECTED = 5, 4, 6, 3
ONE_LAYER = WIDTH + HIDDEN  # multiply-adds of one step for each row of its matrices


class Outputs(nn.Module):
    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(WIDTH, HIDDEN, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0]


class Steps(nn.Module):
    """A cell that the network's own loop calls."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTMCell(WIDTH, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        h, c = self.rnn(x[:, 0])
        for step in range(1, x.size(1)):
            h, c = self.rnn(x[:, step], (h, c))
        return h


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "lstm": (lambda: Outputs(nn.LSTM(WIDTH, HIDDEN)), 4 * HIDDEN * ONE_LAYER),
    "batch_first": (lambda: Outputs(nn.LSTM(WIDTH, HIDDEN, batch_first=True)), 4 * HIDDEN * ONE_LAYER),
    "no_bias": (lambda: Outputs(nn.LSTM(WIDTH, HIDDEN, batch_first=True, bias=False)), 4 * HIDDEN * ONE_LAYER),
    "two_layers_both_ways": (
        lambda: Outputs(nn.LSTM(WIDTH, HIDDEN, 2, batch_first=True, bidirectional=True, dropout=0.5)),
        2 * 4 * HIDDEN * (ONE_LAYER + 2 * HIDDEN + HIDDEN),
    ),
    "projected": (
        lambda: Outputs(nn.LSTM(WIDTH, HIDDEN, 2, batch_first=True, proj_size=PROJECTED)),
        4 * HIDDEN * (WIDTH + 3 * PROJECTED) + 2 * PROJECTED * HIDDEN,
    ),
    "gru": (
        lambda: Outputs(nn.GRU(WIDTH, HIDDEN, batch_first=True, bidirectional=True)),
        2 * 3 * HIDDEN * ONE_LAYER,
    ),
    "rnn_tanh": (lambda: Outputs(nn.RNN(WIDTH, HIDDEN, batch_first=True)), HIDDEN * ONE_LAYER),
    "rnn_relu": (lambda: Outputs(nn.RNN(WIDTH, HIDDEN, nonlinearity="relu", batch_first=True)), HIDDEN * ONE_LAYER),
    "packed": (Packed, 4 * HIDDEN * ONE_LAYER),
    "cell": (Steps, 4 * HIDDEN * ONE_LAYER),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_has_its_products(name: str) -> None:
    build, each_step = NETWORKS[name]
    torch.manual_seed(0)
    file = saved(torch.jit.script(build().eval()))
    x = torch.randn(STEPS, 1, WIDTH) if name == "lstm" else torch.randn(1, STEPS, WIDTH)
    inputs = (x, torch.tensor([STEPS])) if name == "packed" else (x,)
    census = take_census(load_model(file), inputs)
    assert count_macs(load_model(file), inputs) == census.total_macs == STEPS * each_step
    assert sum(layer.macs or 0 for layer in census.layers) == census.total_macs
    for layer in census.layers:
        steps = STEPS if len(layer.weight_shape) > 1 else 0  # biases add
        assert layer.macs == steps * torch.Size(layer.weight_shape).numel()
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False), FlopCounterMode(display=False) as counter:
        load_model(file).eval()(*inputs)
    assert counter.get_total_flops() // 2 == census.total_macs


def test_packed_sequences_count_their_own_lengths() -> None:
    file = saved(torch.jit.script(Packed().eval()))
    inputs = (torch.randn(3, STEPS, WIDTH), torch.tensor([5, 2, 3]))
    assert count_macs(load_model(file), inputs) == (5 + 2 + 3) * 4 * HIDDEN * ONE_LAYER


def test_the_kernel_of_cuda_counts_all_layers() -> None:
    rnn = nn.LSTM(WIDTH, HIDDEN, 2, bidirectional=True, proj_size=PROJECTED, device="meta")
    weights = [weight for group in rnn.all_weights for weight in group]
    x = torch.empty(STEPS, 1, WIDTH, device="meta")
    h, c = (torch.empty(4, 1, size, device="meta") for size in (PROJECTED, HIDDEN))
    options = (HIDDEN, PROJECTED, 2, False, 0.0, False, True, [], None)
    with FlopCounterMode(display=False, custom_mapping=dict(RECURRENT_KERNELS)) as counter:
        torch.ops.aten._cudnn_rnn(x, weights, 5, None, h, c, 2, *options)
    each_step = 2 * (4 * HIDDEN * (WIDTH + PROJECTED) + 4 * HIDDEN * 3 * PROJECTED + 2 * PROJECTED * HIDDEN)
    assert counter.get_total_flops() // 2 == STEPS * each_step

"""Recurrent layers in plain PyTorch, so that each of their matrix products can have rounded operands.

torch computes an LSTM, a GRU or a plain recurrent layer in one call, into which nobody can see. The functions here take
the same arguments, after a `Call`, and give the same results in the same order, to the rounding of float32. They
compute step by step, and hand each number that they make to the Call, which rounds it or leaves it.

A layer with the states h reads a sequence x. For each step t and each direction it computes

    W_ih x[t] + b_ih    and    W_hh h[t - 1] + b_hh,

and from these two and its other states, element by element, the next h. The first product does not wait for h, so it is
computed for all steps at once, as one product; the second is one product for each step. W_hh therefore has as many
gradients as there are steps, and autograd adds them, in float32. What a Call sees:

- inputs: x of each layer, which both directions read, and h before each step, which all operations of the step read.
- activations: h after each step. It is rounded there alone, and not as the elementwise result that it may be.
- elementwise: every other number, after each operation of torch, which are those of torch's CPU kernels: the sum of
  both products, each gate, each product of gates and states, each sum of those, c, and dropout. The first c is read as
  it is.
- multiply: the products by name, "ih_l0" and "hh_l0" of the first layer, "ih_l0_reverse" of its backward direction, as
  the parameters are called; "ih" and "hh" of a cell. Their results are added before anything rounds them, as in one
  accumulator. An LSTM with proj_size has one more in each step, "hr_l0", whose result is h.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from low_precision.forms import Form, Linear


class Call(Protocol):
    """One call of a recurrent layer: what becomes of the numbers that it reads and makes. Shapes stay as they are."""

    def inputs(self, x: Tensor) -> Tensor:
        """What a step or a product over all steps reads; the gradient with respect to it is an error."""
        ...

    def activations(self, y: Tensor) -> Tensor:
        """What a step gives: h; the gradient with respect to it is an error."""
        ...

    def elementwise(self, y: Tensor) -> Tensor:
        """The result of an operation that has no product."""
        ...

    def multiply(self, name: str, a: Tensor, b: Tensor, bias: Tensor | None, form: Form) -> Tensor:
        """The product form.forward(a, b, bias), whose operands may be rounded. A step's has one name in all steps."""
        ...


State = tuple[Tensor, ...]  # (h,), or an LSTM's (h, c); each (rows, features)

# (call, the product with x, the product with h, the states before) -> the states after; h is not handed to the call yet
_Step = Callable[[Call, Tensor, Tensor, State], State]


class _Weights(NamedTuple):
    """The parameters of one direction of one layer."""

    ih: Tensor  # (gates, features of x)
    hh: Tensor  # (gates, features of h)
    bias_ih: Tensor | None  # (gates,)
    bias_hh: Tensor | None
    hr: Tensor | None  # (proj_size, hidden_size)


def _rnn_tanh_step(call: Call, from_x: Tensor, from_h: Tensor, states: State) -> State:
    return (torch.tanh(call.elementwise(from_x + from_h)),)


def _rnn_relu_step(call: Call, from_x: Tensor, from_h: Tensor, states: State) -> State:
    return (torch.relu(call.elementwise(from_x + from_h)),)


def _gru_step(call: Call, from_x: Tensor, from_h: Tensor, states: State) -> State:
    elementwise = call.elementwise
    (h,) = states
    (x_reset, x_update, x_new), (h_reset, h_update, h_new) = from_x.chunk(3, 1), from_h.chunk(3, 1)
    reset = elementwise(torch.sigmoid(elementwise(x_reset + h_reset)))
    update = elementwise(torch.sigmoid(elementwise(x_update + h_update)))
    new = elementwise(torch.tanh(elementwise(x_new + elementwise(reset * h_new))))
    return (elementwise(elementwise(h - new) * update) + new,)  # (1 - update) new + update h, as torch computes it


def _lstm_step(call: Call, from_x: Tensor, from_h: Tensor, states: State) -> State:
    elementwise = call.elementwise
    _, c = states
    for_input, for_forget, for_cell, for_output = elementwise(from_x + from_h).chunk(4, 1)
    input_gate = elementwise(torch.sigmoid(for_input))
    forget_gate = elementwise(torch.sigmoid(for_forget))
    cell_gate = elementwise(torch.tanh(for_cell))
    output_gate = elementwise(torch.sigmoid(for_output))
    c = elementwise(elementwise(forget_gate * c) + elementwise(input_gate * cell_gate))
    return output_gate * elementwise(torch.tanh(c)), c


def _advance(call: Call, step: _Step, weights: _Weights, suffix: str, from_x: Tensor, states: State) -> State:
    """One step of one direction: the states after it. from_x: its rows of the product with x (rows, gates)."""
    h, *others = states
    h = call.inputs(h)
    from_h = call.multiply("hh" + suffix, h, weights.hh, weights.bias_hh, Linear())
    h, *others = step(call, from_x, from_h, (h, *others))
    if weights.hr is not None:
        h = call.multiply("hr" + suffix, call.inputs(call.elementwise(h)), weights.hr, None, Linear())
    return call.activations(h), *others


def _cell(
    call: Call,
    step: _Step,
    input: Tensor,
    states: State,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> State:
    weights = _Weights(w_ih, w_hh, b_ih, b_hh, None)
    from_x = call.multiply("ih", call.inputs(input), weights.ih, weights.bias_ih, Linear())
    return _advance(call, step, weights, "", from_x, states)


def lstm_cell(
    call: Call,
    input: Tensor,
    hx: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """torch.lstm_cell: input (batch, features), hx = (h, c), each (batch, hidden_size) -> the next (h, c)."""
    h, c = _cell(call, _lstm_step, input, tuple(hx), w_ih, w_hh, b_ih, b_hh)
    return h, c


def _cell_with_one_state(step: _Step) -> Callable[..., Tensor]:
    def cell(
        call: Call,
        input: Tensor,
        hx: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Tensor:
        """torch.gru_cell and its like: input (batch, features), hx (batch, hidden_size) -> the next h."""
        (h,) = _cell(call, step, input, (hx,), w_ih, w_hh, b_ih, b_hh)
        return h

    return cell


gru_cell = _cell_with_one_state(_gru_step)
rnn_tanh_cell = _cell_with_one_state(_rnn_tanh_step)
rnn_relu_cell = _cell_with_one_state(_rnn_relu_step)


class _Layers(NamedTuple):
    """All layers of a call: the arguments of torch.lstm and its like that follow the tensors."""

    step: _Step
    flat_weights: Sequence[Tensor]
    has_biases: bool
    num_layers: int
    dropout: float
    train: bool
    bidirectional: bool

    def weights(self) -> list[list[_Weights]]:
        """Those of each layer and in it of each direction."""
        directions = 2 if self.bidirectional else 1
        count = len(self.flat_weights) // (self.num_layers * directions)  # of tensors, in one direction of one layer
        each = [
            _weights(self.flat_weights[i : i + count], self.has_biases) for i in range(0, len(self.flat_weights), count)
        ]
        return [each[i : i + directions] for i in range(0, len(each), directions)]


def _weights(tensors: Sequence[Tensor], has_biases: bool) -> _Weights:
    """tensors: w_ih, w_hh, then b_ih and b_hh where there are biases, then w_hr where there is a projection."""
    ih, hh, *others = tensors
    bias_ih, bias_hh = others[:2] if has_biases else (None, None)
    projection = others[2:] if has_biases else others
    return _Weights(ih, hh, bias_ih, bias_hh, projection[0] if projection else None)


def _recur(call: Call, layers: _Layers, x: Tensor, rows: list[int], packed: bool, initial: State) -> tuple[Tensor, ...]:
    """The output, and for each state the last ones of all layers and directions.

    x: packed rows (sum of rows, features), or (batch, time, features). rows: how many sequences each step has, in
    falling order. initial: each (layers times directions, batch, features). The output is (sum of rows, features) or
    (time, batch, features).
    """
    last: list[State] = []
    output = x
    for number, directions in enumerate(layers.weights()):
        if number > 0:
            if layers.train and layers.dropout > 0:  # in torch's order of the numbers, so that torch's mask is drawn
                output = call.elementwise(F.dropout(output, layers.dropout))
            # The rows of a sample lie together, as in a Linear layer that reads (batch, time, features).
            x = output if packed else output.transpose(0, 1).contiguous()
        x = call.inputs(x)
        outputs = []
        for direction, weights in enumerate(directions):
            suffix = f"_l{number}" + ("_reverse" if direction else "")
            from_x = call.multiply("ih" + suffix, x, weights.ih, weights.bias_ih, Linear())
            by_step = from_x.split_with_sizes(rows) if packed else from_x.unbind(1)
            first = tuple(state[len(last)] for state in initial)
            run = _run_backwards if direction else _run
            all_h, states = run(call, layers.step, weights, suffix, by_step, rows, first)
            outputs.append(torch.cat(all_h) if packed else torch.stack(all_h))
            last.append(states)
        output = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
    return output, *(torch.stack(states) for states in zip(*last, strict=True))


def _run(
    call: Call, step: _Step, weights: _Weights, suffix: str, from_x: Sequence[Tensor], rows: list[int], states: State
) -> tuple[list[Tensor], State]:
    """All steps from the first to the last: h of each, and each sequence's states after its last step."""
    all_h: list[Tensor] = []
    ended: list[State] = []  # the states of the sequences that have ended, the shortest ones first
    for part, count, before in zip(from_x, rows, [rows[0], *rows], strict=False):
        if count < before:
            ended.append(tuple(state[count:] for state in states))
            states = tuple(state[:count] for state in states)
        states = _advance(call, step, weights, suffix, part, states)
        all_h.append(states[0])
    if ended:
        states = tuple(torch.cat(parts) for parts in zip(states, *reversed(ended), strict=True))
    return all_h, states


def _run_backwards(
    call: Call, step: _Step, weights: _Weights, suffix: str, from_x: Sequence[Tensor], rows: list[int], initial: State
) -> tuple[list[Tensor], State]:
    """All steps from the last to the first: h of each in the order of time, and the states after the first step.

    A sequence begins at its last step, with its initial states.
    """
    all_h: list[Tensor] = []
    states = tuple(state[: rows[-1]] for state in initial)
    for part, count, before in zip(reversed(from_x), reversed(rows), reversed([*rows, rows[-1]]), strict=False):
        if count > before:
            begun = (state[before:count] for state in initial)
            states = tuple(torch.cat(parts) for parts in zip(states, begun, strict=True))
        states = _advance(call, step, weights, suffix, part, states)
        all_h.append(states[0])
    return all_h[::-1], states


def _layer(step: _Step, call: Call, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """torch.lstm and its like. arguments: those of either form,
    (input, hx, flat_weights, has_biases, num_layers, dropout, train, bidirectional, batch_first), or
    (data, batch_sizes, hx, flat_weights, has_biases, num_layers, dropout, train, bidirectional) of a packed sequence.
    """
    if isinstance(arguments[3], bool):
        x, hx, *settings, batch_first = arguments
        x = x if batch_first else x.transpose(0, 1).contiguous()
        if x.shape[1] == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")  # as torch has it
        rows, packed = [x.shape[0]] * x.shape[1], False
    else:
        x, batch_sizes, hx, *settings = arguments
        rows, packed, batch_first = batch_sizes.tolist(), True, False
    initial = (hx,) if isinstance(hx, Tensor) else tuple(hx)
    output, *last = _recur(call, _Layers(step, *settings), x, rows, packed, initial)
    return (output.transpose(0, 1) if batch_first else output), *last


def lstm(call: Call, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """torch.lstm, of a padded or a packed sequence -> output, h_n, c_n. hx = (h_0, c_0). Shapes: torch.nn.LSTM."""
    output, h, c = _layer(_lstm_step, call, arguments)
    return output, h, c


def gru(call: Call, *arguments: Any) -> tuple[Tensor, Tensor]:
    """torch.gru, of a padded or a packed sequence -> output, h_n. hx = h_0. Shapes: torch.nn.GRU."""
    output, h = _layer(_gru_step, call, arguments)
    return output, h


def rnn_tanh(call: Call, *arguments: Any) -> tuple[Tensor, Tensor]:
    """torch.rnn_tanh, of a padded or a packed sequence -> output, h_n. hx = h_0. Shapes: torch.nn.RNN."""
    output, h = _layer(_rnn_tanh_step, call, arguments)
    return output, h


def rnn_relu(call: Call, *arguments: Any) -> tuple[Tensor, Tensor]:
    """torch.rnn_relu, of a padded or a packed sequence -> output, h_n. hx = h_0. Shapes: torch.nn.RNN."""
    output, h = _layer(_rnn_relu_step, call, arguments)
    return output, h

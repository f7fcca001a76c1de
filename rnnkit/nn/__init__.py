"""Recurrent layers and cells that take the place of torch.nn's, and `Custom`, a layer of any cell."""

from .custom import Custom
from .gru import GRU, GRUCell
from .lstm import LSTM, LSTMCell
from .rnn import RNN, RNNCell

__all__ = ["GRU", "LSTM", "RNN", "Custom", "GRUCell", "LSTMCell", "RNNCell"]

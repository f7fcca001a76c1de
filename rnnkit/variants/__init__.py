"""Cells that people have asked for, each a few lines that read as its paper's equations, for `rnnkit.Custom`.

    layer = rnnkit.Custom(rnnkit.variants.PeepholeLSTM, 64, 128)
    layer = rnnkit.Custom(rnnkit.variants.ZoneoutLSTM(zoneout_h=0.1), 64, 128)

An instance has options; a class stands for their defaults.
"""

from .gru import AUGRU, GRU, MGU, GRUResetBefore, LiGRU
from .grud import GRUD, GRUDInputs, time_gaps
from .lstm import LSTM, SLSTM, CoupledLSTM, PeepholeLSTM
from .masks import (
    CandidateDropoutGRU,
    CandidateDropoutLSTM,
    RecurrentDropoutGRU,
    RecurrentDropoutLSTM,
    ZoneoutGRU,
    ZoneoutLSTM,
)
from .norm import BlockGRU, LayerNormBlockGRU, LayerNormGRU, LayerNormLSTM, LayerNormSumGRU, LayerNormSumLSTM
from .rnn import RNN, IndRNN

__all__ = [
    "AUGRU",
    "GRU",
    "GRUD",
    "LSTM",
    "MGU",
    "RNN",
    "SLSTM",
    "BlockGRU",
    "CandidateDropoutGRU",
    "CandidateDropoutLSTM",
    "CoupledLSTM",
    "GRUDInputs",
    "GRUResetBefore",
    "IndRNN",
    "LayerNormBlockGRU",
    "LayerNormGRU",
    "LayerNormLSTM",
    "LayerNormSumGRU",
    "LayerNormSumLSTM",
    "LiGRU",
    "PeepholeLSTM",
    "RecurrentDropoutGRU",
    "RecurrentDropoutLSTM",
    "ZoneoutGRU",
    "ZoneoutLSTM",
    "time_gaps",
]

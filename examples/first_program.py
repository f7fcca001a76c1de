"""The classic first program: one vanilla RNN, its parameters, a sentence, the shapes of what comes out.

With torch.nn it reads the same but for the import. Note that hx, and so h_n, is [layers, batch, hidden] also with
batch_first=True, where out is [batch, steps, hidden]: in general out[b, -1] equals h_n[0, b].
"""

import torch

from rnnkit import RNN  # was: from torch.nn import RNN

rnn = RNN(input_size=8, hidden_size=16, nonlinearity="tanh", batch_first=True)
for name, parameter in rnn.named_parameters():
    print(f"{name:<14} {list(parameter.shape)}")

h_0 = torch.zeros(1, 1, 16)  # layers, batch, hidden
sentence = torch.rand(1, 5, 8)  # one sentence of five words, eight numbers for each
out, h_n = rnn(sentence, h_0)

print("out", list(out.shape))
print("h_n", list(h_n.shape))
print("the last output is the last state:", torch.equal(out[0, -1], h_n[0, -1]))

"""What lies below `rnnkit.ops` and `rnnkit.functional`: how a call is run, recorded by autograd, seen by torch.compile.

`stack` runs a whole call as one, `autograd` a layer in one direction, both in eager mode; `custom_ops` are the opaque
operators of torch.compile and torch.export, `override` the seam for those who look inside, `profiler` the rows that
torch's profilers show, `streams` the second stream of a GPU.
"""

"""What lies below `rnnkit.ops`: how one layer in one direction is run, recorded by autograd, and seen by torch.compile.

`custom_ops` are the opaque operators of torch.compile and torch.export, `autograd` the function of eager mode, `quick`
the calls that skip the checks, `override` the seam for those who look inside, `streams` the second stream of a GPU.
"""

"""One kernel a file: the Triton kernel, what launches it over tensors, and its twin in plain torch.

A kernel computes in fp32 and rounds once for each number that it writes.
"""

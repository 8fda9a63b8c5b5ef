"""Kernels for sparse weights: tensors in, tensors out.

This package knows nothing of models, configs or files, and never imports `sparsekit`. Layouts are in `layout24`,
`quant`, `layout_block` and, for GPUs, `fragments24`; each other module is one kernel, one machine or one choice.
Nothing is imported here, so that `import sparsekit_kernels` loads neither Triton nor a compiler.
"""

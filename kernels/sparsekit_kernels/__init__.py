"""Kernels for sparse weights: tensors in, tensors out.

This package knows nothing of models, configs or files, and never imports `sparsekit`. Layouts are in `layout24`;
`reference` holds the plain torch version of every kernel; each other module is one kernel or one machine.
Nothing is imported here, so that `import sparsekit_kernels` loads neither Triton nor a compiler.
"""

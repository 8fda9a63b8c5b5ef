"""Where transformers meets packed weights: `from_pretrained` and `save_pretrained` understand them.

Importing this package does not import transformers; `register` waits until somebody else does.
"""

QUANT_METHOD = "sparsekit"
"""The name in `config.json` by which transformers finds the quantizer."""

"""Where transformers meets packed weights: `from_pretrained` and `save_pretrained` understand them.

Importing this package does not import transformers; `register` waits until somebody else does.
"""

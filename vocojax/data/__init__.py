"""From records on disk to packed batches."""

import logging

# Nothing here needs PyTorch, so that it is missing is no news: transformers warns of it when `tokenizer` imports it.
logging.getLogger("transformers").addFilter(lambda record: "PyTorch was not found" not in str(record.msg))

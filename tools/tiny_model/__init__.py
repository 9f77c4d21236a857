"""Building blocks of ``tools/train_tiny_model.py``: text, tokenizer, model, training, export."""

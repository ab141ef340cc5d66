"""What the tokens of a tokenizer stand for, and where two tokenizers read the same."""

"""Training: BERT's own recipe and fine-tuning, on transformers' Trainer and accelerate.

`loop` is the loop both share; nothing here is imported by `import bert_fast`.
"""
